"""The audit trail, and the choice of the version to go back to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tasks import held, history, rollback
from tasks.held import Image
from tasks.history import IN_SERVICE, Entry


def entry(n: int, version: str, result: str = IN_SERVICE) -> Entry:
    return Entry("ann@laptop", f"2026-11-25T01:00:{n:02d}Z", "release", version, result=result)


class Store:
    """One key of Consul. rivals: values that somebody else writes between our reading and our writing."""

    def __init__(self, *rivals: list[Entry]) -> None:
        self.kv = self
        self.rivals = list(rivals)
        self.value, self.index = "", 0

    def get(self, key: str) -> tuple[str, dict[str, Any] | None]:
        found = {"Value": self.value, "ModifyIndex": self.index} if self.index else None
        if self.rivals:
            self.value, self.index = json.dumps([vars(e) for e in self.rivals.pop(0)]), self.index + 1
        return "1", found

    def put(self, key: str, value: str, cas: int) -> bool:
        if cas != self.index:
            return False
        self.value, self.index = value, self.index + 1
        return True


def test_an_entry_is_added_then_replaced_in_its_place() -> None:
    store = Store()
    history.write(store, entry(1, "0.0.2", history.UNDER_WAY))  # type: ignore[arg-type]
    history.write(store, entry(2, "0.0.3"))  # type: ignore[arg-type]
    history.write(store, entry(1, "0.0.2"))  # type: ignore[arg-type]
    assert history.entries(store) == [entry(1, "0.0.2"), entry(2, "0.0.3")]  # type: ignore[arg-type]


def test_what_another_run_writes_meanwhile_is_kept() -> None:
    store = Store([entry(1, "0.0.2")])
    history.write(store, entry(2, "0.0.3"))  # type: ignore[arg-type]
    assert history.entries(store) == [entry(1, "0.0.2"), entry(2, "0.0.3")]  # type: ignore[arg-type]


def test_only_the_last_entries_are_kept() -> None:
    kept: list[Entry] = []
    for n in range(history.KEEP + 3):
        kept = history.merge(kept, Entry("ann", str(n), "release", "0.0.1"))
    assert [item.when for item in kept] == [str(n) for n in range(3, history.KEEP + 3)]


def test_a_run_that_left_its_entry_under_way_was_cut_off() -> None:
    kept = history.merge([entry(1, "0.0.2", history.UNDER_WAY)], entry(2, "0.0.3", history.UNDER_WAY))
    assert [item.result for item in kept] == [history.CUT_OFF, history.UNDER_WAY]


def test_only_what_went_well_was_in_service_the_last_first() -> None:
    kept = [
        entry(1, "0.0.2"),
        entry(2, "0.0.3"),
        entry(3, "0.0.4", "failed: unhealthy"),
        entry(4, "0.0.2"),
        entry(5, "0.0.5", history.UNDER_WAY),
    ]
    assert history.served(kept) == ["0.0.2", "0.0.3"]


def test_the_current_version_is_what_runs_and_of_two_the_interrupted_one() -> None:
    kept = [entry(1, "0.0.2"), entry(2, "0.0.3", history.UNDER_WAY)]
    assert rollback.current({"0.0.2"}, kept) == "0.0.2"
    assert rollback.current({"0.0.2", "0.0.3"}, kept) == "0.0.3"
    assert rollback.current(set(), kept) == ""


def images(*versions: str) -> held.Images:
    return {version: Image(f"sha256:{version}", "source") for version in versions}


ALL = {"worker-01": images("0.0.2", "0.0.3", "0.0.4"), "worker-02": images("0.0.2", "0.0.3", "0.0.4")}
BEFORE = ["0.0.4", "0.0.3", "0.0.2"]


@pytest.mark.parametrize(
    ("to", "now", "version"),
    [(None, "0.0.4", "0.0.3"), (None, "0.0.3", "0.0.4"), (None, "", "0.0.4"), ("0.0.2", "0.0.4", "0.0.2")],
)
def test_the_version_before_or_the_one_that_is_asked_for(to: str | None, now: str, version: str) -> None:
    assert rollback.choose(to, now, BEFORE, ALL) == (version, None)


def test_a_version_that_one_worker_lacks_is_passed_over() -> None:
    found = {**ALL, "worker-02": images("0.0.2", "0.0.4")}
    assert rollback.choose(None, "0.0.4", BEFORE, found) == ("0.0.2", None)
    fault = "to=0.0.3: worker-02 no longer holds it; every worker holds: 0.0.4, 0.0.2"
    assert rollback.choose("0.0.3", "0.0.4", BEFORE, found)[1] == fault


def test_what_was_never_in_service_is_refused_though_it_is_held() -> None:
    found = {name: {**kept, **images("0.0.5")} for name, kept in ALL.items()}
    fault = "to=0.0.5: was never in service; every worker holds: 0.0.4, 0.0.3, 0.0.2"
    assert rollback.choose("0.0.5", "0.0.4", BEFORE, found)[1] == fault


def test_different_images_of_one_version_are_refused() -> None:
    found = {**ALL, "worker-02": {**ALL["worker-02"], "0.0.3": Image("sha256:other", "source")}}
    assert "different images" in (rollback.choose("0.0.3", "0.0.4", BEFORE, found)[1] or "")


def test_nothing_before_is_said() -> None:
    assert rollback.choose(None, "0.0.2", ["0.0.2"], ALL)[1] == (
        "no version before 0.0.2 is left; every worker holds: 0.0.2"
    )


def test_images_of_this_apps_repository_with_a_digest_count() -> None:
    name = "127.0.0.1:5000/app"
    lines = [
        f"0.0.2 abc {name}@sha256:1",
        f"0.0.3 def 10.0.0.1:5000/app@sha256:9 {name}@sha256:2",
        f"  {name}@sha256:3",  # no labels
        "0.0.4 ghi ",  # built here and never pushed
    ]
    assert held.parse(lines, name) == {"0.0.2": Image("sha256:1", "abc"), "0.0.3": Image("sha256:2", "def")}
