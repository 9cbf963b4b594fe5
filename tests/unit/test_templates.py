"""What the roles upload to new hosts, checked by the tools that will read it."""

import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pytest

from tasks.mirror import cache_dir
from tests.unit.conftest import ROOT, run

VERSIONS = [
    argument
    for tool in ("consul", "nomad", "consul_template")
    for argument in ("--data", f"{tool}_version=1.0.0")
]


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The text that a host got at a path from a run of the roles; one run for each set of arguments."""

    @cache
    def hosts(*arguments: str) -> Path:
        folder = tmp_path_factory.mktemp("hosts")
        ran = run(folder, "install.py", *VERSIONS, *arguments, state={}, workers=4)
        assert ran.code == 0, ran.stderr
        return folder

    def read(host: str, path: str, *arguments: str) -> str:
        return (hosts(*arguments) / host / path.lstrip("/")).read_text()

    return read


def newest_zip(tool: str) -> Path | None:
    """The newest zip of a tool for this machine in the cache."""
    arch = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    zips = cache_dir().glob(f"{tool}/*/{tool}_*_linux_{arch}.zip")
    return max(zips, key=lambda zip: [int(n) for n in re.findall(r"\d+", zip.name)], default=None)


@pytest.fixture(scope="session")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """The path of a tool: the one on this machine, or from the cache. Without it the test is skipped."""
    folder = tmp_path_factory.mktemp("tools")

    def find(name: str) -> str:
        if installed := shutil.which(name):
            return installed
        if not (found := newest_zip(name)):
            pytest.skip(f"no {name} on this machine or in {cache_dir()}: its configuration is not checked")
        if not (folder / name).exists():
            zipfile.ZipFile(found).extract(name, folder)
            (folder / name).chmod(0o755)
        return str(folder / name)

    yield find
    shutil.rmtree(folder)  # binaries of 150 MB, which pytest would keep for three runs


def check(*command: str | Path) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("host", ["worker-01", "worker-04", "proxy-01"])
def test_consul_accepts_its_configuration(
    uploaded: Callable[..., str], tool: Callable[[str], str], tmp_path: Path, host: str
) -> None:
    (tmp_path / "consul.hcl").write_text(uploaded(host, "/etc/consul.d/consul.hcl"))
    check(tool("consul"), "validate", tmp_path / "consul.hcl")


@pytest.mark.parametrize("host", ["worker-01", "worker-04"])
def test_nomad_accepts_its_configuration(
    uploaded: Callable[..., str], tool: Callable[[str], str], tmp_path: Path, host: str
) -> None:
    (tmp_path / "nomad.hcl").write_text(uploaded(host, "/etc/nomad.d/nomad.hcl"))
    check(tool("nomad"), "config", "validate", tmp_path / "nomad.hcl")


@pytest.mark.parametrize(
    ("host", "path", "server"),
    [
        ("worker-01", "/etc/consul.d/consul.hcl", True),
        ("worker-04", "/etc/consul.d/consul.hcl", False),
        ("proxy-01", "/etc/consul.d/consul.hcl", False),
        ("worker-01", "/etc/nomad.d/nomad.hcl", True),
        ("worker-04", "/etc/nomad.d/nomad.hcl", False),
    ],
)
def test_only_the_servers_expect_a_quorum(
    uploaded: Callable[..., str], host: str, path: str, server: bool
) -> None:
    assert ("bootstrap_expect = 3\n" in uploaded(host, path)) is server


@pytest.mark.parametrize(
    ("tool", "path"), [("consul", "/etc/consul.d/consul.hcl"), ("nomad", "/etc/nomad.d/nomad.hcl")]
)
def test_everyone_joins_the_servers_and_binds_to_its_own_address(
    uploaded: Callable[..., str], tool: str, path: str
) -> None:
    text = uploaded("worker-04", path)
    assert re.search(r'^bind_addr += "192.168.56.14"$', text, re.MULTILINE)
    assert 'retry_join     = ["192.168.56.11", "192.168.56.12", "192.168.56.13"]' in text
    assert "0.0.0.0" not in text


def test_one_change_of_a_knob_changes_the_file(uploaded: Callable[..., str]) -> None:
    path = "/etc/consul.d/consul.hcl"
    assert "raft_multiplier = 5\n" in uploaded("worker-01", path, "--data", "consul_raft_multiplier=5")


def test_docker_asks_the_resolver_on_its_own_bridge(uploaded: Callable[..., str]) -> None:
    settings: dict[str, Any] = json.loads(uploaded("worker-01", "/etc/docker/daemon.json"))
    assert settings["dns"] == [str(ip_interface(settings["bip"]).ip)]
    assert settings["live-restore"] is True
    assert "insecure-registries" not in settings
    assert all(isinstance(value, str) for value in settings["log-opts"].values())  # Docker refuses numbers


UNITS = [
    ("worker-01", "/etc/systemd/system/consul.service"),
    ("worker-01", "/etc/systemd/system/nomad.service"),
    ("worker-01", "/etc/systemd/system/private-address.service"),
]


@pytest.mark.parametrize(("host", "path"), UNITS)
def test_systemd_accepts_the_unit(uploaded: Callable[..., str], tmp_path: Path, host: str, path: str) -> None:
    """In a folder of its own, where the units that it needs are; binaries need not be there."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze on this machine: the units are not checked")
    units = tmp_path / "units"
    units.mkdir()
    for other in UNITS:
        text = uploaded(*other)
        (units / Path(other[1]).name).write_text(
            re.sub(r"^(Exec\w+=)\S+", r"\1/bin/true", text, flags=re.MULTILINE)
        )
    unit = units / Path(path).name
    ran = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert (ran.returncode, [line for line in ran.stderr.splitlines() if unit.name in line]) == (0, [])


def test_the_address_unit_waits_for_the_whole_address(uploaded: Callable[..., str], tmp_path: Path) -> None:
    """Its own command, with an `ip` that shows the address only the second time; .1 is not .11."""
    text = uploaded("worker-01", "/etc/systemd/system/private-address.service")
    command = re.search(r"^ExecStart=/bin/sh -c '(.*)'$", text, re.MULTILINE)
    assert command
    (tmp_path / "ip").write_text(
        f"#!/bin/sh\necho x >> {tmp_path}/asked\ntest $(wc -l < {tmp_path}/asked) -lt 2 || a=192.168.56.11\n"
        'echo "2: eth1 inet ${a:-192.168.56.111}/24 scope global"\n'
    )
    (tmp_path / "ip").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["sh", "-c", command[1]], env={"PATH": path}, check=True, timeout=30)
    assert (tmp_path / "asked").read_text() == "x\nx\n"


def test_no_template_opens_every_interface() -> None:
    """Only HAProxy's front door may, by a knob of its own."""
    for template in (ROOT / "templates").rglob("*"):
        if template.is_file():
            assert "0.0.0.0" not in template.read_text(), template
