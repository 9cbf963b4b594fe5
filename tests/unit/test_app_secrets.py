"""The app's secrets: what is refused, what tells that they changed, and what Nomad is given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import requests
from nomad import Nomad
from nomad.api.exceptions import URLNotFoundNomadException
from pyinfra.api import DeployError
from pyinfra.api.host import HostData

from tasks import app_secrets, secrets

ODD = "a\"b'c $HOME #x \\n =ü"


@pytest.fixture
def data(tmp_path: Path) -> HostData:
    secrets.write(tmp_path, "app.env", f"# ours\n\nKEY={ODD}\nOTHER=1\nNOT=named")
    return cast(
        "HostData",
        SimpleNamespace(
            secrets_folder=str(tmp_path),
            app_name="app",
            app_secrets=["KEY", "OTHER"],
            app_secrets_as="environment",
        ),
    )


def change(data: HostData, text: str) -> None:
    secrets.write(Path(data.secrets_folder), "app.env", text)


def test_only_those_that_are_named_are_given(data: HostData) -> None:
    assert app_secrets.values(data) == {"KEY": ODD, "OTHER": "1"}
    assert app_secrets.environment(data) == app_secrets.values(data)


def test_the_command_line_names_them_with_commas(data: HostData) -> None:
    listed = app_secrets.stamp(data)
    data.app_secrets = "KEY,OTHER"
    assert app_secrets.stamp(data) == listed


def test_as_a_file_they_are_not_in_the_environment(data: HostData) -> None:
    data.app_secrets_as = "file"
    assert app_secrets.environment(data) == {}
    assert app_secrets.text(data) == f"KEY={ODD}\nOTHER=1\n"


def test_without_any_nothing_is_asked_for(data: HostData) -> None:
    data.app_secrets, data.secrets_folder = [], "/nowhere"
    assert (app_secrets.values(data), app_secrets.stamp(data)) == ({}, "")


def test_a_missing_name_is_refused(data: HostData) -> None:
    data.app_secrets = ["KEY", "ABSENT"]
    with pytest.raises(DeployError, match=r"app.env has no line ABSENT=\.\.\.$"):
        app_secrets.stamp(data)


def test_a_missing_file_is_refused(data: HostData) -> None:
    (Path(data.secrets_folder) / "app.env").unlink()
    with pytest.raises(DeployError, match=r"app.env is missing; it needs a line NAME=value"):
        app_secrets.stamp(data)


def test_a_file_that_others_can_read_is_refused(data: HostData) -> None:
    (Path(data.secrets_folder) / "app.env").chmod(0o640)
    with pytest.raises(DeployError, match="chmod 600"):
        app_secrets.stamp(data)


def test_an_unknown_form_is_refused(data: HostData) -> None:
    data.app_secrets_as = "magic"
    with pytest.raises(DeployError, match="choose environment or file"):
        app_secrets.stamp(data)


def test_the_stamp_stays_until_a_value_or_the_form_changes(data: HostData) -> None:
    first = app_secrets.stamp(data)
    assert app_secrets.stamp(data) == first
    change(data, f"KEY={ODD}\nOTHER=1\nNOT=another")
    assert app_secrets.stamp(data) == first
    data.app_secrets_as = "file"
    assert app_secrets.stamp(data) != first
    data.app_secrets_as = "environment"
    change(data, f"KEY={ODD}\nOTHER=2")
    assert app_secrets.stamp(data) != first


def test_the_same_values_have_another_stamp_elsewhere(data: HostData, tmp_path: Path) -> None:
    """Nobody can find out a short password by trying stamps."""
    first = app_secrets.stamp(data)
    (tmp_path / "salt-app").unlink()
    (tmp_path / "made").unlink()
    assert app_secrets.stamp(data) != first


class Variables:
    """The calls of python-nomad that are used."""

    def __init__(self, versions: list[str]) -> None:
        self.variable = self.job = self
        self.versions, self.kept, self.writes = versions, cast("dict[str, Any]", {}), 0

    def get_variable(self, path: str) -> dict[str, Any]:
        assert path == "nomad/jobs/app"
        if not self.kept:
            raise URLNotFoundNomadException(requests.Response())
        return {"Items": self.kept, "ModifyIndex": 7}

    def create_variable(self, path: str, payload: dict[str, Any], cas: int) -> None:
        assert cas == (7 if self.kept else 0)
        self.kept, self.writes = payload["Items"], self.writes + 1

    def get_versions(self, job: str) -> dict[str, Any]:
        return {"Versions": [{"Meta": {"secrets": stamp}} for stamp in self.versions] + [{"Meta": None}]}


def store(variables: Variables, data: HostData) -> None:
    app_secrets.store(cast("Nomad", variables), data)


def test_nomad_is_given_them_once(data: HostData) -> None:
    variables = Variables([])
    store(variables, data)
    store(variables, data)
    quoted = 'KEY="a\\"b\'c $HOME #x \\\\n =\\u00fc"\nOTHER="1"\n'
    assert (variables.kept, variables.writes) == ({app_secrets.stamp(data): quoted}, 1)


def test_those_of_a_version_that_nomad_may_go_back_to_stay(data: HostData) -> None:
    variables = Variables(["s1"])
    variables.kept = {"s1": "KEY=old", "s0": "KEY=older"}
    store(variables, data)
    assert set(variables.kept) == {"s1", app_secrets.stamp(data)}
