"""Nomad's gossip key against key rings that only pretend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from nomad.api.exceptions import BaseNomadException

from tasks import nomad_keyring, secrets


class Rings:
    """The servers' key rings, which change together."""

    def __init__(self, key: str) -> None:
        self.keys, self.used, self.deaf = {key}, key, False
        self.agent = self

    def request(self, _: str, what: str, method: str, json: dict[str, str] | None = None) -> object:
        if what == "list":
            return SimpleNamespace(json=lambda: {"Keys": dict.fromkeys(self.keys, 3)})
        if self.deaf:
            answer = requests.Response()
            answer.status_code, answer._content = 500, b"1/3 nodes reported failure"
            raise BaseNomadException(answer)
        key = (json or {})["Key"]
        if what == "install":
            self.keys.add(key)
        elif what == "use":
            assert key in self.keys
            self.used = key
        else:
            assert key != self.used
            self.keys.remove(key)
        return None


@pytest.fixture
def where(tmp_path: Path) -> Path:
    secrets.make(tmp_path / "secrets")
    return tmp_path / "secrets"


@pytest.fixture
def rings(where: Path, monkeypatch: pytest.MonkeyPatch) -> Rings:
    rings = Rings(secrets.read(where, nomad_keyring.FILE))

    @contextmanager
    def api(host: object, token: str) -> Iterator[Rings]:
        yield rings

    data = SimpleNamespace(secrets_folder=str(where))
    monkeypatch.setattr(nomad_keyring, "nomad_api", api)
    monkeypatch.setattr(nomad_keyring, "host", SimpleNamespace(data=data, print_prefix=""))
    return rings


def step(change: object) -> bool:
    return nomad_keyring._change(None, nomad_keyring.host, change)  # type: ignore[arg-type]


def test_all_use_the_next_key_before_the_old_one_is_forgotten(where: Path, rings: Rings) -> None:
    old = rings.used
    secrets.begin(where, [nomad_keyring.FILE])
    assert step(nomad_keyring._use_next)
    assert rings.used != old and old in rings.keys
    assert step(nomad_keyring._forget_old)
    assert rings.keys == {rings.used} == {secrets.read(where, nomad_keyring.FILE)}
    assert secrets.unfinished(where) == []


def test_again_is_no_harm(where: Path, rings: Rings) -> None:
    secrets.begin(where, [nomad_keyring.FILE])
    for change in (nomad_keyring._use_next, nomad_keyring._forget_old):
        assert step(change) and step(change)
    assert rings.keys == {rings.used}


def test_one_that_does_not_follow_ends_it_and_the_old_key_stays(
    where: Path, rings: Rings, caplog: pytest.LogCaptureFixture
) -> None:
    old = rings.used
    secrets.begin(where, [nomad_keyring.FILE])
    rings.deaf = True
    assert not step(nomad_keyring._use_next)
    assert (rings.used, rings.keys) == (old, {old})
    assert "Nomad's key ring: 1/3 nodes reported failure; repair that" in caplog.text
