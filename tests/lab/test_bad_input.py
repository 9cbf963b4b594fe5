"""Bad input: one line says what is wrong, the exit code is not 0, and nothing has changed anywhere."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from group_data import all as knobs
from tests.lab import hosts

pytestmark = pytest.mark.usefixtures("as_found")
needs_nomad = pytest.mark.skipif(hosts.SCHEDULER != "nomad", reason="asks Nomad's scheduler")
cuts_power = pytest.mark.skipif(hosts.SETTINGS.provider != "docker", reason="cuts Docker hosts' power")

WORKER, OTHER_WORKER = hosts.names("workers")[:2]
BUILDER = hosts.names("builder")[0]
# What an unwanted change would touch: services and containers; files and binaries, images.
_RUNNING = """
systemctl show -P ActiveEnterTimestamp consul nomad docker haproxy consul-template
! command -v docker >/dev/null || docker ps --all --no-trunc --format '{{.ID}} {{.Names}}'
"""
_FINGERPRINT = f"""
{_RUNNING}
find /etc /usr/local /var/tmp -type f -printf '%p %T@\\n'
readlink /usr/local/bin/*
test ! -e /var/lib/registry || find /var/lib/registry -name link
"""


def fingerprint(members: list[str]) -> set[str]:
    found = hosts.on_all(members, _FINGERPRINT)
    lines = {f"{host}: {line}" for host, output in found.items() for line in output.splitlines()}
    if hosts.SCHEDULER == "nomad":
        job = hosts.api(members[0], knobs.nomad_http_port, f"/v1/job/{knobs.app_name}?stale")
        lines.add(f"job: {job['JobModifyIndex']}")
    return lines


def refused(line: str, script: str, *arguments: str, down: str = "", **environment: str) -> None:
    """Run it: it must fail, print the line (a pattern) just once, and leave every host as it is."""
    up = [host for host in hosts.HOSTS if host != down]
    before = fingerprint(up)
    run = hosts.pyinfra(script, *arguments, **environment)
    assert run.code != 0, run.output
    assert "Traceback" not in run.output, run.output
    assert len(run.lines(line)) == 1, run.output
    assert fingerprint(up) ^ before == set()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "version: missing; give three numbers: --data version=0.0.3"),
        (["version=1.10"], r"version: arrives as the float 1\.1, .* --data version=0.0.3"),
        (["version=v1.2.3"], r"version v1\.2\.3: not MAJOR\.MINOR\.PATCH"),
        (["version=1.2.3+b4"], r"version 1\.2\.3\+b4: a Docker tag cannot hold build metadata"),
        (["version=0.9.9", "app_folder=nowhere"], "app_folder=nowhere: no Dockerfile there"),
        pytest.param(
            ["version=0.9.9", "app_memory_mb=999999"],
            r"0\.9\.9: Nomad cannot place it: too little memory \(on 3 of 3 nodes\)",
            marks=needs_nomad,
        ),
    ],
)
def test_release_refuses(arguments: list[str], line: str) -> None:
    refused(line, "release.py", *(f"--data={argument}" for argument in arguments))


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("only=haproxy,dsn", "only=haproxy,dsn: no role dsn; roles: base, firewall, consul, .*, haproxy"),
        ("consul_version=1.0.0", r"consul [0-9.]+ is newer than 1\.0\.0; set consul_version to"),
    ],
)
def test_deploy_refuses(argument: str, line: str) -> None:
    refused(line, "deploy.py", f"--data={argument}")


@pytest.mark.parametrize("script", ["deploy.py", "release.py"])
def test_other_scheduler(script: str) -> None:
    mine = hosts.SCHEDULER
    other = {"nomad": "docker", "docker": "nomad"}[mine]
    line = f"{mine} runs its app, scheduler={other} would cut it off; set scheduler={mine}"
    refused(line, script, "--data=version=0.9.9", f"--data=scheduler={other}")


def test_running_version_from_changed_source(as_found: str, tmp_path: Path) -> None:
    folder = copy_of_app(tmp_path, "app.py", "# changed\n")
    line = f"{as_found}: runs already and .* has changed since it was built; choose a new version"
    refused(line, "release.py", f"--data=version={as_found}", f"--data=app_folder={folder}")


def test_build_that_fails(tmp_path: Path) -> None:
    folder = copy_of_app(tmp_path, "Dockerfile", "RUN echo no such package >&2; exit 7\n")
    line = r"0\.9\.9 is not built: .*code: 7.* Nothing was released"
    refused(line, "release.py", "--data=version=0.9.9", f"--data=app_folder={folder}")


def copy_of_app(target: Path, file: str, more: str) -> Path:
    """The app's folder with lines added to one file."""
    folder = shutil.copytree(hosts.ROOT / knobs.app_folder, target / "app")
    with (folder / file).open("a") as out:
        out.write(more)
    return folder


def test_full_disk_at_a_build() -> None:
    with tiny_disk(BUILDER, "/var/tmp"):
        line = r"0\.9\.9 is not built: /var/tmp/.* cannot be written, .* Nothing was released"
        refused(line, "release.py", "--data=version=0.9.9")


def test_full_disk_at_an_installation(newer_consul: Path) -> None:
    line = rf"{WORKER}: consul 999\.0\.0 needs 1 MB in /usr/local/lib, 0 MB are free; free some space"
    with tiny_disk(WORKER, "/usr/local/lib/consul"):
        refused(line, "deploy.py", "--data=consul_version=999.0.0", HASHISTACK_CACHE=str(newer_consul))


def test_artifact_with_a_wrong_sum(newer_consul: Path) -> None:
    for zip_ in newer_consul.rglob("*.zip"):
        with zip_.open("ab") as file:
            file.write(b"one byte more")
    line = r"consul_999\.0\.0_linux_\w+\.zip: wrong sum, expected \w+, found \w+; remove it and run again"
    refused(line, "deploy.py", "--data=consul_version=999.0.0", HASHISTACK_CACHE=str(newer_consul))


@pytest.fixture
def newer_consul(tmp_path: Path) -> Path:
    """A local folder with a Consul that is newer than any."""
    folder = tmp_path / "consul" / "999.0.0"
    folder.mkdir(parents=True)
    sums = ""
    for arch in ("amd64", "arm64"):
        name = folder / f"consul_999.0.0_linux_{arch}.zip"
        with zipfile.ZipFile(name, "w") as archive:
            archive.writestr("consul", bytes(400_000))
        sums += f"{hashlib.sha256(name.read_bytes()).hexdigest()}  {name.name}\n"
    (folder / "consul_999.0.0_SHA256SUMS").write_text(sums)
    return tmp_path


@contextmanager
def tiny_disk(host: str, folder: str) -> Iterator[None]:
    """A file system of 16 kB over a folder."""
    hosts.on(host, f"mount -t tmpfs -o size=16k tmpfs {folder}")
    try:
        yield
    finally:
        hosts.on(host, f"umount {folder}")


def test_registry_that_is_down() -> None:
    with hosts.frozen_registries(OTHER_WORKER):
        line = f"{OTHER_WORKER}: its registry does not answer .* go on without: --exclude {OTHER_WORKER}"
        refused(line, "release.py", "--data=version=0.9.9")


@pytest.mark.once
def test_unhealthy_quorum() -> None:
    """The sick server takes no part in this run, so the new configuration stops nothing healthy. Nor
    does it at once, before Consul itself has noticed."""
    hosts.on(OTHER_WORKER, "systemctl stop consul")
    others = [host for host in hosts.HOSTS if host != OTHER_WORKER]
    before = hosts.on_all(others, _RUNNING)
    try:
        change = f"--data=consul_raft_multiplier={knobs.consul_raft_multiplier + 1}"
        run = hosts.pyinfra("deploy.py", "--exclude", OTHER_WORKER, change, "--data=roll_deadline_s=5")
        assert run.code != 0
        line = f"consul: not restarted, not caught up: {OTHER_WORKER}; repair that first"
        assert len(run.lines(line)) == 1, run.output
        assert hosts.on_all(others, _RUNNING) == before
    finally:
        assert hosts.pyinfra("deploy.py").code == 0
    hosts.wait_for("the cluster to be whole", hosts.whole)


@cuts_power
def test_worker_that_is_down(as_found: str) -> None:
    """Named with the way to go on; deploy.py and release.py do without it."""
    address = hosts.HOSTS[OTHER_WORKER]["address"]
    hosts.power_off(OTHER_WORKER)
    try:
        hosts.wait_for("the others to serve alone", lambda: serve_without(address), 120)
        line = f"{OTHER_WORKER}: not reached over SSH; repair it, or go on without: --exclude {OTHER_WORKER}"
        refused(line, "deploy.py", down=OTHER_WORKER)
        refused(line, "release.py", f"--data=version={as_found}", down=OTHER_WORKER)
        without = ("--exclude", OTHER_WORKER)
        run = hosts.pyinfra("deploy.py", *without)
        assert (run.code, run.changed) == (0, {}), run.output
        # In Nomad a changed count moves nothing else, which is quick.
        change = "app_count=2" if hosts.SCHEDULER == "nomad" else f"app_memory_mb={knobs.app_memory_mb + 1}"
        run = hosts.pyinfra("release.py", *without, f"--data=version={as_found}", f"--data={change}")
        assert run.code == 0, run.output
        assert len(hosts.serving() or ()) == 2
    finally:
        hosts.power_on(OTHER_WORKER)
        hosts.wait_for("the cluster to be whole", hosts.whole, 120)
    assert hosts.pyinfra("release.py", f"--data=version={as_found}").code == 0


def serve_without(address: str) -> bool:
    """The others have taken over all instances (docker scheduler: they have no more than their own)."""
    servers = hosts.serving() or set()
    count = knobs.app_count if hosts.SCHEDULER == "nomad" else len(hosts.names("workers")) - 1
    return len(servers) == count and address not in str(servers)
