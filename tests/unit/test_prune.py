"""Which images go: never one that runs, or that a way back may need."""

from __future__ import annotations

import pytest

from tasks import prune
from tasks.history import CUT_OFF, IN_SERVICE, Entry

FOUND = {f"0.0.{n}": {f"sha256:{n}"} for n in (1, 2, 3, 10)}


@pytest.mark.parametrize(
    ("served", "running", "keep", "gone"),
    [
        (["0.0.10", "0.0.3", "0.0.2", "0.0.1"], {"0.0.10"}, 4, []),
        (["0.0.10", "0.0.3", "0.0.2", "0.0.1"], {"0.0.10"}, 2, ["0.0.2", "0.0.1"]),
        # After a way back, 0.0.10 was the version before.
        (["0.0.1", "0.0.10", "0.0.3", "0.0.2"], {"0.0.1"}, 2, ["0.0.3", "0.0.2"]),
        # An old one still runs somewhere.
        (["0.0.10", "0.0.3", "0.0.2", "0.0.1"], {"0.0.10", "0.0.1"}, 2, ["0.0.2"]),
        # What was never in service goes first, the lowest number before the others.
        (["0.0.2", "0.0.1"], {"0.0.2"}, 3, ["0.0.3"]),
        # What is no longer there takes no place.
        (["0.0.10", "0.0.9", "0.0.8", "0.0.3"], {"0.0.10"}, 2, ["0.0.2", "0.0.1"]),
        ([], set(), 10, []),
    ],
)
def test_surplus(served: list[str], running: set[str], keep: int, gone: list[str]) -> None:
    found = prune.surplus(FOUND, served, running, keep)
    assert list(found) == gone
    assert all(found[version] == FOUND[version] for version in gone)


def test_an_image_that_another_version_shares_stays() -> None:
    found = FOUND | {"0.0.1": FOUND["0.0.10"]}
    assert prune.surplus(found, ["0.0.10", "0.0.3", "0.0.2"], {"0.0.10"}, 3) == {"0.0.1": set()}


def entry(version: str, digest: str, result: str = IN_SERVICE) -> Entry:
    return Entry("ann@laptop", "2026-11-25T01:00:00Z", "release", version, digest, result)


@pytest.mark.parametrize(
    ("kept", "gone"),
    [
        ([entry("0.0.3", "sha256:right")], ["sha256:wrong"]),
        ([entry("0.0.3", "sha256:other")], []),  # then who knows
        ([entry("0.0.3", "sha256:right", CUT_OFF)], []),
        ([], []),
    ],
)
def test_strays(kept: list[Entry], gone: list[str]) -> None:
    found = {"0.0.2": {"sha256:2"}, "0.0.3": {"sha256:wrong", "sha256:right"}}
    assert prune.strays(found, kept) == gone
