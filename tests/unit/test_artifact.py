"""Installing an artifact: pyinfra on this machine (@local), in a folder of the test's own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tasks import artifact, mirror

ROOT = Path(__file__).parents[2]
DEPLOY = """
import sys

from pyinfra import host
from tasks import artifact

artifact.LIB, artifact.BIN = host.data.lib, host.data.bin
for line in artifact.faults(host, ["consul"]):
    print("fault:", line, file=sys.stderr)
for line in artifact.unsigned(host):
    print("unsigned:", line, file=sys.stderr)
artifact.install(name="Install Consul", tool="consul", version=host.data.install)
"""


class Run(NamedTuple):
    code: int
    stderr: str
    changed: bool

    def lines(self, what: str) -> list[str]:
        return re.findall(rf"^{what}: (.*)$", self.stderr, re.MULTILINE)


class Machine:
    """This machine, with /usr/local and a mirror under the test's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lib, self.bin, self.mirror = (folder / n for n in (".", "lib", "bin", "mirror"))
        for path in (self.lib, self.bin):
            path.mkdir()

    def release(self, version: str, size: int = 10_000) -> Path:
        """A Consul that prints its version; its zip has a LICENSE first, as the publisher's have."""
        folder = self.mirror / "consul" / version
        folder.mkdir(parents=True)
        script = f"#!/bin/sh\necho Consul v{version}\n#".ljust(size)
        for arch in artifact.ARCHES.values():
            zip_ = folder / f"consul_{version}_linux_{arch}.zip"
            with zipfile.ZipFile(zip_, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("LICENSE.txt", "text")
                archive.writestr("consul", script)
            with (folder / f"consul_{version}_SHA256SUMS").open("a") as sums:
                sums.write(f"{hashlib.sha256(zip_.read_bytes()).hexdigest()}  {zip_.name}\n")
        return folder

    def install(self, version: str, deploy: str = DEPLOY) -> Run:
        data = {
            "lib": str(self.lib),
            "bin": str(self.bin),
            "install": version,
            "artifact_mirror": str(self.mirror),
            "consul_version": version,
            "consul_template_version": "99.0.0",  # newer than what this machine may have
            "nomad_version": "99.0.0",
        }
        (self.folder / "inventory.py").write_text(f"hosts = [('@local', {data!r})]\n")
        (self.folder / "deploy.py").write_text(deploy)
        ran = subprocess.run(
            [sys.executable, "-m", "pyinfra", "-y", "--json", "inventory.py", "deploy.py"],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "HASHISTACK_CACHE": str(self.folder / "cache")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        results: dict[str, Any] = json.loads(ran.stdout).get("results", {}) if ran.stdout else {}
        changed = any(operation["success"] for operation in results.get("operations", []))
        return Run(ran.returncode, re.sub(r"\x1b\[[0-9;]*m", "", ran.stderr), changed)

    def version(self) -> str:
        """What the installed tool says of itself."""
        return subprocess.run(
            [self.bin / "consul"], capture_output=True, text=True, check=True
        ).stdout.strip()

    def versions(self) -> list[str]:
        return sorted(path.name for path in (self.lib / "consul").iterdir())

    def snapshot(self) -> list[tuple[str, float]]:
        """Every file and link, and when it was made."""
        paths = [*self.lib.rglob("*"), *self.bin.rglob("*")]
        return sorted((str(path), path.lstat().st_mtime) for path in paths)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_tool_is_installed_once(machine: Machine) -> None:
    machine.release("1.2.3")
    first = machine.install("1.2.3")
    assert (first.code, first.changed, first.lines("fault")) == (0, True, [])
    assert machine.version() == "Consul v1.2.3"
    assert os.readlink(machine.bin / "consul") == f"{machine.lib}/consul/1.2.3/consul"
    assert [path.name for path in sorted((machine.lib / "consul" / "1.2.3").iterdir())] == [
        "consul",
        "unsigned",
    ]
    before = machine.snapshot()
    second = machine.install("1.2.3")
    assert (second.code, second.changed) == (0, False)
    assert second.lines("unsigned") == ["consul 1.2.3: local build, unsigned"]
    assert machine.snapshot() == before


def test_a_second_run_needs_no_mirror(machine: Machine) -> None:
    folder = machine.release("1.2.3")
    machine.install("1.2.3")
    for file in folder.iterdir():
        file.unlink()
    second = machine.install("1.2.3")
    assert (second.code, second.changed, second.lines("fault")) == (0, False, [])


def test_an_upgrade_keeps_the_version_before_and_no_older_one(machine: Machine) -> None:
    for version in ("1.2.3", "1.2.4", "1.10.0"):
        machine.release(version)
        assert machine.install(version).code == 0
        assert machine.version() == f"Consul v{version}"
    assert machine.versions() == ["1.10.0", "1.2.4"]


def test_an_older_version_is_refused_and_nothing_changes(machine: Machine) -> None:
    machine.release("1.2.3")
    machine.release("1.10.0")
    machine.install("1.10.0")
    before = machine.snapshot()
    run = machine.install("1.2.3")
    assert run.code != 0
    assert run.lines("fault") == [
        "@local: consul 1.10.0 is newer than 1.2.3; set consul_version to 1.10.0 or newer"
    ]
    assert machine.snapshot() == before


def test_a_tool_installed_elsewhere_counts_too(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    other = machine.folder / "other"
    other.mkdir()
    (other / "consul").write_text("#!/bin/sh\necho Consul v1.9.0\necho Revision x\n")
    (other / "consul").chmod(0o755)
    monkeypatch.setenv("PATH", f"{other}:{os.environ['PATH']}")
    machine.release("1.2.3")
    assert machine.install("1.2.3").lines("fault") == [
        "@local: consul 1.9.0 is newer than 1.2.3; set consul_version to 1.9.0 or newer"
    ]


def test_a_run_that_was_killed_is_finished_by_the_next(machine: Machine) -> None:
    machine.release("1.2.3")
    killed = machine.lib / "consul" / ".new"
    killed.mkdir(parents=True)
    (killed / "consul").write_text("half a bin")
    assert machine.install("1.2.3").code == 0
    assert machine.version() == "Consul v1.2.3"
    assert machine.versions() == ["1.2.3"]


def test_a_run_killed_before_the_swap_uploads_nothing_again(machine: Machine) -> None:
    folder = machine.release("1.2.3")
    machine.install("1.2.3")
    (machine.bin / "consul").unlink()
    for file in folder.iterdir():
        file.unlink()
    run = machine.install("1.2.3")
    assert (run.code, run.changed) == (0, True)
    assert machine.version() == "Consul v1.2.3"


SPOIL = """
import dataclasses
from tasks import mirror

fill = mirror.fill
mirror.fill = lambda *arguments: dataclasses.replace(fill(*arguments), {change})
"""


def test_an_upload_with_a_wrong_sum_replaces_nothing(machine: Machine) -> None:
    machine.release("1.2.3")
    machine.install("1.2.3")
    machine.release("1.2.4")
    run = machine.install("1.2.4", SPOIL.format(change="sha256='0' * 64") + DEPLOY)
    assert run.code != 0
    assert "_1.2.4_linux_" in run.stderr
    assert "wrong sum after the upload; run again" in run.stderr
    assert machine.version() == "Consul v1.2.3"
    assert machine.install("1.2.4").code == 0
    assert machine.version() == "Consul v1.2.4"


def test_a_signed_tool_is_not_called_unsigned(machine: Machine) -> None:
    machine.release("1.2.3")
    machine.install("1.2.3", SPOIL.format(change="signed=True") + DEPLOY)
    assert machine.install("1.2.3").lines("unsigned") == []


def test_a_mirror_without_the_version_is_told_before_anything_changes(machine: Machine) -> None:
    run = machine.install("1.2.3")
    assert run.code != 0
    assert "no such file" in run.lines("fault")[0]
    assert machine.snapshot() == []


# Without pyinfra


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("", "0.0.1"),
        ("1.2.3", "1.2.4"),
        ("1.9.0", "1.10.0"),
        ("1.22.7", "2.0.0"),
        ("2.0.0-rc1", "2.0.0"),
        ("2.0.0-beta1", "2.0.0-rc1"),
        ("2.0.0-rc.2", "2.0.0-rc.10"),
        ("2.0.0-1", "2.0.0-alpha"),
        ("1.9.9", "2.0.0-rc1"),
    ],
)
def test_versions_are_ordered(older: str, newer: str) -> None:
    assert artifact.older(older, newer)
    assert not artifact.older(newer, older)
    assert not artifact.older(older, older)


def test_an_edition_is_no_other_version() -> None:
    assert not artifact.older("1.2.3+ent", "1.2.3")
    assert not artifact.older("1.2.3", "1.2.3+ent")


def test_the_fact_reads_what_runs_and_what_is_installed() -> None:
    states = artifact.Tools().process(
        [
            "consul link /usr/local/lib/consul/1.3.0/consul",
            "consul present 1.2.3",
            "consul present 1.3.0",
            "consul unsigned 1.3.0",
            "consul installed /usr/local/lib/consul/1.3.0/consul",
            "consul running /usr/local/lib/consul/1.2.3/consul (deleted)",
            "consul free 12345",
            "nomad link",
            "nomad running Nomad v2.0.5",
            "nomad free 12345",
        ]
    )
    assert states["consul"] == artifact.ToolState(
        link="/usr/local/lib/consul/1.3.0/consul",
        installed="1.3.0",
        running="1.2.3",
        present=["1.2.3", "1.3.0"],
        unsigned=["1.3.0"],
        free=12345,
    )
    assert states["nomad"] == artifact.ToolState(running="2.0.5", free=12345)
    assert states["consul-template"] == artifact.ToolState()


class FakeHost:
    """What `faults` asks of a host."""

    name = "worker-01"

    def __init__(self, source: Path, free: int, arch: str, version: str) -> None:
        self.free, self.arch = free, arch
        self.data = HostData({"artifact_mirror": str(source), "consul_version": version})

    def get_fact(self, fact: type) -> object:
        states = {tool: artifact.ToolState(free=self.free) for tool in artifact.TOOLS}
        return states if fact is artifact.Tools else self.arch


class HostData(dict[str, str]):
    artifact_mirror = property(lambda self: self["artifact_mirror"])


def faults(machine: Machine, free: int = 10**9, arch: str = "x86_64", version: str = "1.2.3") -> list[str]:
    member = FakeHost(machine.mirror, free, arch, version)
    return artifact.faults(member, ["consul"])  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["latest", "1.1", "../1.2.3", "1.2.3; true"])
def test_what_is_no_version_is_told(machine: Machine, version: str) -> None:
    line = f"consul_version {version}: not a version; give three numbers, such as 1.22.3"
    assert faults(machine, version=version) == [line]


def test_a_full_disk_is_told_before_anything_changes(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HASHISTACK_CACHE", str(machine.folder / "cache"))
    machine.release("1.2.3", size=50_000_000)
    assert faults(machine) == []
    assert faults(machine, free=10_000_000) == [
        "worker-01: consul 1.2.3 needs 50 MB in /usr/local/lib, 10 MB are free; free some space"
    ]


def test_an_unknown_machine_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASHISTACK_CACHE", str(machine.folder / "cache"))
    assert faults(machine, arch="riscv64") == ["worker-01: no consul for riscv64; use amd64 or arm64"]


def test_a_zip_without_the_tool_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASHISTACK_CACHE", str(machine.folder / "cache"))
    folder = machine.release("1.2.3")
    zip_ = folder / "consul_1.2.3_linux_amd64.zip"
    with zipfile.ZipFile(zip_, "w") as archive:
        archive.writestr("vault", "x")
    sums = f"{hashlib.sha256(zip_.read_bytes()).hexdigest()}  {zip_.name}\n"
    (folder / "consul_1.2.3_SHA256SUMS").write_text(sums)
    assert faults(machine) == [f"{zip_}: no zip with a file consul"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_the_shell_command_unpacks_what_was_packed(tmp_path: Path, compression: int, size: int) -> None:
    zip_ = tmp_path / "consul.zip"
    content = os.urandom(size)
    with zipfile.ZipFile(zip_, "w", compression) as archive:
        archive.writestr("LICENSE.txt", "text")
        archive.writestr("consul", content)
        archive.writestr("more", "text")
    command = artifact._inflate(mirror.Artifact("consul", "1.2.3", "amd64", zip_, "", False))
    ran = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, check=True)
    assert ran.stdout == content


def test_the_shell_command_notices_a_damaged_zip(tmp_path: Path) -> None:
    zip_ = tmp_path / "consul.zip"
    with zipfile.ZipFile(zip_, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("consul", os.urandom(1000))
    command = artifact._inflate(mirror.Artifact("consul", "1.2.3", "amd64", zip_, "", False))
    damaged = bytearray(zip_.read_bytes())
    damaged[500] ^= 1
    zip_.write_bytes(damaged)
    ran = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, check=False)
    assert ran.returncode != 0
