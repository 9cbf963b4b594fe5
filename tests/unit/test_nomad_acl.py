"""Nomad's tokens against an API that only pretends: bootstrap, what differs, and replacing them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from nomad.api.exceptions import (
    BadRequestNomadException,
    URLNotAuthorizedNomadException,
    URLNotFoundNomadException,
)

from tasks import nomad_acl, secrets

OURS = ["hashistack-operator", "hashistack-release", "hashistack-status"]


def _answer(code: int, text: str) -> requests.Response:
    response = requests.Response()
    response.status_code, response._content = code, text.encode()
    return response


class Acl:
    """Nomad's side. Stops the caller after `left` calls that change something."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.tokens: dict[str, dict[str, str]] = {}  # by their accessors
        self.rules: dict[str, str] = {}
        self.shown, self.left = "", 1000

    def _change(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def request(self, what: str, json: dict[str, str], method: str) -> None:
        assert (what, method) == ("bootstrap", "post")
        if self.tokens:
            raise BadRequestNomadException(_answer(400, "ACL bootstrap already done (reset index: 9)"))
        self._change()
        self._add("Bootstrap Token", json["BootstrapSecret"])

    def _add(self, name: str, secret: str) -> dict[str, str]:
        token = {"AccessorID": str(uuid.uuid4()), "SecretID": secret, "Name": name}
        self.tokens[token["AccessorID"]] = token
        return token

    def get_self_token(self) -> None:
        if self.shown not in {token["SecretID"] for token in self.tokens.values()}:
            raise URLNotAuthorizedNomadException(_answer(403, "Permission denied"))

    def get_tokens(self) -> list[dict[str, str]]:
        self.get_self_token()
        return [{k: v for k, v in token.items() if k != "SecretID"} for token in self.tokens.values()]

    def get_token(self, accessor: str) -> dict[str, str]:
        return self.tokens[accessor]

    def create_token(self, token: dict[str, Any]) -> dict[str, str]:
        self.get_self_token()
        self._change()
        assert token["Type"] == "management" or token["Policies"] == [token["Name"]]
        return self._add(token["Name"], str(uuid.uuid4()))

    def delete_token(self, accessor: str) -> None:
        self._change()
        del self.tokens[accessor]

    def get_policy(self, name: str) -> dict[str, str]:
        self.get_self_token()
        if name not in self.rules:
            raise URLNotFoundNomadException(_answer(404, "not found"))
        return {"Rules": self.rules[name]}

    def create_policy(self, name: str, policy: dict[str, str]) -> None:
        self._change()
        self.rules[name] = policy["Rules"]

    def names(self) -> list[str]:
        return sorted(token["Name"] for token in self.tokens.values())

    def secrets(self) -> dict[str, str]:
        return {token["Name"]: token["SecretID"] for token in self.tokens.values()}


@pytest.fixture
def acl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Acl:
    where = tmp_path / "secrets"
    secrets.make(where)
    host = SimpleNamespace(
        data=SimpleNamespace(secrets_folder=str(where), app_name="app"), print_prefix="[worker-01] "
    )
    acl = Acl(where)

    @contextmanager
    def api(host: object, token: str) -> Iterator[object]:
        acl.shown = secrets.read(where, f"token-nomad-{token}")
        yield SimpleNamespace(acl=acl)

    monkeypatch.setattr(nomad_acl, "host", host)
    monkeypatch.setattr(nomad_acl, "nomad_api", api)
    return acl


def kept(acl: Acl) -> dict[str, str]:
    names = {"Bootstrap Token": "bootstrap"} | {name: name.removeprefix("hashistack-") for name in OURS}
    return {name: secrets.read(acl.where, f"token-nomad-{file}") for name, file in names.items()}


def replace() -> bool:
    return nomad_acl._replace_tokens(None, nomad_acl.host)  # type: ignore[arg-type]


def test_a_new_cluster_is_bootstrapped_with_our_token(acl: Acl) -> None:
    assert nomad_acl.missing(nomad_acl.host.data)
    assert nomad_acl.grant() is None
    assert kept(acl) == acl.secrets()
    assert nomad_acl.differs() is None


@pytest.mark.parametrize("calls", range(7))
def test_cut_off_anywhere_the_next_run_ends_it_with_one_of_each(acl: Acl, calls: int) -> None:
    acl.left = calls
    with pytest.raises(KeyboardInterrupt):
        nomad_acl.grant()
    acl.left = 1000
    assert nomad_acl.grant() is None
    assert acl.names() == ["Bootstrap Token", *OURS]
    assert kept(acl) == acl.secrets()


def test_a_cluster_of_another_bootstrap_token_is_an_error_in_one_line(acl: Acl) -> None:
    nomad_acl.grant()
    secrets.write(acl.where, "token-nomad-bootstrap", str(uuid.uuid4()))
    assert "made with another one, restore that" in (nomad_acl.grant() or "")
    assert acl.names() == ["Bootstrap Token", *OURS]


def test_a_lost_file_is_asked_for_again(acl: Acl) -> None:
    nomad_acl.grant()
    (acl.where / "token-nomad-release").unlink()
    assert nomad_acl.differs()
    assert nomad_acl.grant() is None
    assert kept(acl) == acl.secrets()
    assert acl.names() == ["Bootstrap Token", *OURS]


def test_rules_that_somebody_changed_are_written_again(acl: Acl) -> None:
    nomad_acl.grant()
    acl.rules["hashistack-release"] = 'node { policy = "write" }'
    assert nomad_acl.differs() == "release: to be written"
    nomad_acl.grant()
    assert nomad_acl.differs() is None


def test_replaced_tokens_leave_nothing_of_the_old_ones(acl: Acl) -> None:
    nomad_acl.grant()
    theirs = acl._add("a user's own", "x")
    before = acl.secrets()
    assert replace()
    after = acl.secrets()
    assert after.pop("a user's own") == before.pop("a user's own") == theirs["SecretID"]
    assert kept(acl) == after
    assert not set(after.values()) & set(before.values())


@pytest.mark.parametrize("calls", range(8))
def test_a_replacement_cut_off_anywhere_is_ended_by_the_next(acl: Acl, calls: int) -> None:
    nomad_acl.grant()
    before = acl.secrets()
    acl.left = calls
    with pytest.raises(KeyboardInterrupt):
        replace()
    acl.left = 1000
    assert replace()
    assert acl.names() == ["Bootstrap Token", *OURS]
    assert kept(acl) == acl.secrets()
    assert not set(acl.secrets().values()) & set(before.values())
