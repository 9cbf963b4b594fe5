"""Ways back without a registry, and what a run that dies or meets another one leaves: the app serves on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from group_data import all as knobs
from tests.lab import hosts
from tests.lab.test_bad_input import refused
from tests.lab.test_release import release, versions_that_serve
from tests.load import Load

WORKERS = hosts.names("workers")
PRUNE = "Delete the versions that are not needed any more"
IMAGE = f"127.0.0.1:{knobs.registry_port}/{knobs.app_name}"
# What a release prints while old and new instances serve together.
MIDDLE = "instances healthy" if hosts.SCHEDULER == "nomad" else "HAProxy to let go of"


@pytest.fixture
def other(as_found: str) -> str:
    """A version to go back to; on a lab that never had a second one, it is made first."""
    candidates: list[str] = list(status()["rollback"])
    for version in ("0.0.3", as_found) if not candidates else ():
        assert release(version).code == 0
        candidates = ["0.0.3"]
    return candidates[0]


def test_a_release_that_dies_midway_and_the_way_back(
    load: Load, as_found: str, other: str, tmp_path: Path
) -> None:
    """No registry answers. A second run is refused while the first lives, and waits once it is dead."""
    load.versions = frozenset({as_found, other})
    with hosts.frozen_registries(*WORKERS):
        die_midway(other, as_found, tmp_path / "log")
        run = release(other)
        assert run.code == 0, run.output
        assert run.lines(rf"the lock is held by .* for: release {other}; no sign of life, waited"), run.output
        assert versions_that_serve() == {other}

        run = hosts.pyinfra("rollback.py", "--data", f"to={as_found}")
        assert (run.code, list(run.changed)) == (0, [f"Replace what runs by {as_found}"]), run.output
        assert versions_that_serve() == {as_found}
    assert [(e["action"], e["version"], e["result"]) for e in status()["releases"]["history"][-3:]] == [
        ("release", other, "cut off"),
        ("release", other, "in service"),
        ("rollback", as_found, "in service"),
    ]


def die_midway(version: str, before: str, log: Path) -> None:
    """Kill a release while both versions serve. Until then, nobody else may begin."""
    first = begin(log, "release.py", "--data", f"version={version}")
    hosts.wait_for("both versions to serve", lambda: MIDDLE in log.read_text(), 120)
    run = hosts.pyinfra("rollback.py", "--data", f"to={before}")
    assert run.code == 1
    line = rf"another run is under way: .* for: release {version}; wait until that has ended"
    assert len(run.lines(line)) == 1, run.output
    first.kill()
    assert first.wait() == -signal.SIGKILL, log.read_text()


def begin(log: Path, script: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pyinfra", "-y", "inventory.py", script, *arguments]
    with log.open("w") as out:
        return subprocess.Popen(command, cwd=hosts.ROOT, stdout=out, stderr=out)


def status() -> dict[str, Any]:
    command = [sys.executable, "-m", "pyinfra", "-y", "inventory.py", "status.py", "--data", "format=json"]
    done = subprocess.run(command, cwd=hosts.ROOT, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if found["healthy"] else 1)
    return found


@pytest.mark.usefixtures("as_found")
def test_a_way_back_that_there_is_not() -> None:
    refused("to=9.9.9: was never in service; every worker holds: ", "rollback.py", "--data=to=9.9.9")
    refused("to: arrives as the float 1.1", "rollback.py", "--data=to=1.10")


def test_a_way_back_that_one_worker_lost(other: str) -> None:
    """Its Docker can have it again from its registry."""
    digest = status()["rollback"][other]
    image = f"{IMAGE}@{digest}"
    remove = f"docker ps --all --quiet --filter status=exited --filter ancestor={image} | xargs -r docker rm"
    hosts.on(
        WORKERS[0], f"{remove} >/dev/null; docker rmi $(docker images --quiet --filter reference={image})"
    )
    try:
        line = f"to={other}: {WORKERS[0]} no longer holds it; every worker holds: "
        refused(line, "rollback.py", f"--data=to={other}")
        assert other not in status()["rollback"]
    finally:
        hosts.on(WORKERS[0], f"docker pull --quiet {image}")
    assert other in status()["rollback"]


def test_old_versions_go(as_found: str, other: str) -> None:
    """After a release, from each registry and Docker, but for the last two. What was deleted stays so."""
    # The same layers in another manifest, which is another image.
    copy = (
        ". /etc/registry-sync.conf; app=docker://$ADDRESS:$PORT/$REPOSITORY;"
        ' skopeo copy --quiet --format oci "${COPY_TLS[@]}" $app:%s $app:0.0.1'
    )
    for name in WORKERS[:2]:
        hosts.on(name, copy % as_found)
    run = release(as_found, "--data=registry_keep_versions=2")
    assert (run.code, list(run.changed)) == (0, [PRUNE]), run.output
    held = f"docker images --quiet {IMAGE} | sort -u | wc -l"
    for name in WORKERS:
        tags = hosts.api(name, knobs.registry_port, f"/v2/{knobs.app_name}/tags/list")["tags"]
        assert sorted(tags) == sorted([as_found, other])
        assert hosts.on(name, "registry-sync missing") == ""
        assert hosts.on(name, held).split() == ["2"]
