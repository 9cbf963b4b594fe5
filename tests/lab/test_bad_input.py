"""Bad input: one line says what is wrong, the exit code is not 0, and nothing has changed anywhere."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from group_data import all as knobs
from tests.lab import hosts

pytestmark = pytest.mark.usefixtures("as_found")
WORKER, BUILDER = hosts.names("workers")[0], hosts.names("builder")[0]
# What an unwanted change would touch: since when the services run, their files and binaries, containers, images.
_FINGERPRINT = """
systemctl show -P ActiveEnterTimestamp consul nomad docker haproxy consul-template
find /etc /usr/local -newerct '2 days ago' -type f ! -path '*/.*' -printf '%p %T@\\n' | sort
readlink /usr/local/bin/*
! command -v docker >/dev/null || docker ps --all --no-trunc --format '{{.ID}}'
find /var/lib/registry -name index 2>/dev/null
ls /var/tmp
"""


def fingerprint() -> dict[str, object]:
    return {
        **hosts.on_all(list(hosts.HOSTS), _FINGERPRINT),
        "job": hosts.api(WORKER, knobs.nomad_http_port, f"/v1/job/{knobs.app_name}")["JobModifyIndex"]
        if hosts.SCHEDULER == "nomad"
        else None,
    }


def refused(line: str, script: str, *arguments: str) -> hosts.Run:
    """Run it: it must fail and leave everything as it is, and print the line (a pattern) just once."""
    before = fingerprint()
    run = hosts.pyinfra(script, *arguments)
    assert run.code != 0, run.output
    assert "Traceback" not in run.output, run.output
    assert len(run.lines(line)) == 1, run.output
    assert fingerprint() == before
    return run


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "version: missing; give three numbers: --data version=0.0.3"),
        (["version=1.10"], r"version: arrives as the float 1\.1, .*--data version=0.0.3"),
        (["version=1.2"], r"version: arrives as the float 1\.2"),
        (["version=v1.2.3"], r"version v1\.2\.3: not MAJOR\.MINOR\.PATCH"),
        (["version=1.2.3+b4"], r"version 1\.2\.3\+b4: a Docker tag cannot hold build metadata"),
        (["version=0.9.9", "app_memory_mb=999999"], "0.9.9: .*(cannot place it: too little memory|memory)"),
    ],
)
def test_release_refuses(arguments: list[str], line: str) -> None:
    refused(line, "release.py", *(f"--data={argument}" for argument in arguments))


def test_running_version_from_changed_source(as_found: str, tmp_path: Path) -> None:
    folder = shutil.copytree(hosts.ROOT / knobs.app_folder, tmp_path / "app")
    (folder / "app.py").write_text((folder / "app.py").read_text() + "# changed\n")
    line = f"{as_found}: runs already and .* has changed since it was built; choose a new version"
    refused(line, "release.py", f"--data=version={as_found}", f"--data=app_folder={folder}")


def test_build_that_fails(tmp_path: Path) -> None:
    folder = shutil.copytree(hosts.ROOT / knobs.app_folder, tmp_path / "app")
    with (folder / "Dockerfile").open("a") as dockerfile:
        dockerfile.write("RUN echo no such package >&2; exit 7\n")
    line = r"0\.9\.9 is not built: .*(exit|returned).*7.* Nothing was released"
    refused(line, "release.py", "--data=version=0.9.9", f"--data=app_folder={folder}")


def test_full_disk_at_a_build() -> None:
    with tiny_disk(BUILDER, "/var/tmp"):
        line = r"0\.9\.9 is not built: .*(No space left|disk).* Nothing was released"
        refused(line, "release.py", "--data=version=0.9.9")


def test_full_disk_at_an_installation(newer_consul: list[str]) -> None:
    with tiny_disk(WORKER, "/usr/local/lib/consul"):
        refused(rf"{WORKER}: consul .* needs \d+ MB in /usr/local/lib, \d+ MB are free", "deploy.py", *newer_consul)


@contextmanager
def tiny_disk(host: str, folder: str) -> Iterator[None]:
    """A file system of 16 kB over a folder."""
    hosts.on(host, f"mount -t tmpfs -o size=16k tmpfs {folder}")
    try:
        yield
    finally:
        hosts.on(host, f"umount {folder}")
