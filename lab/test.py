"""The lab part of `make test`: the same tests with each scheduler that can be had on this machine.

A lab that is up keeps its shape; the one with the other scheduler is made afresh.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys

from lab import controller, hosts, settings, up
from lab.command import stage
from lab.settings import ROOT, LabError, Settings
from tasks import mirror


def main() -> None:
    shape = settings.choose(settings.load(), os.environ, bool(hosts.known_ids()))
    schedulers = available()
    results = {scheduler: test(scheduler, shape, scheduler == schedulers[0]) for scheduler in schedulers}
    for scheduler, code in results.items():
        print(f"lab tests, {scheduler} scheduler: {'failed' if code else 'passed'}")
    sys.exit(any(results.values()))


def available() -> list[str]:
    """The scheduler that runs already first: its hosts are there."""
    knobs = runpy.run_path(str(ROOT / "group_data" / "all.py"))
    version = knobs["nomad_version"]
    try:
        mirror.fill("nomad", version, up.arch(), knobs["artifact_mirror"])
    except mirror.MirrorError as error:
        print(f"SKIPPED: all lab tests with scheduler=nomad, since Nomad {version} cannot be had: {error}")
        return ["docker"]
    running = settings.load().data.get("scheduler", "nomad")
    return sorted(settings.SCHEDULERS, key=lambda scheduler: scheduler != running)


def test(scheduler: str, shape: Settings, first: bool) -> int:
    """The exit code of pytest against a lab of this shape with this scheduler."""
    if hosts.known_ids() and settings.load().data.get("scheduler") != scheduler:
        make("down")
    names = ("workers", "proxies", "provider", "http_port", "network")
    make("up", f"SCHEDULER={scheduler}", *(f"{name.upper()}={getattr(shape, name)}" for name in names))
    if not first:
        print("Deselected here: tests marked `once`, which have run with the other scheduler", flush=True)
    with stage(f"Lab tests with scheduler={scheduler}"):
        pytest = [str(controller.VENV / "bin" / "pytest"), "tests/lab", "tests/faults"]
        pytest += ["-m", "not slow" if first else "not slow and not once", "--durations=10"]
        return subprocess.run(pytest, cwd=ROOT, env=os.environ | {"PYINFRA_YES": "1"}).returncode


def make(*arguments: str) -> None:
    if subprocess.run(["make", "--no-print-directory", *arguments], cwd=ROOT).returncode:
        raise LabError(f"make {' '.join(arguments)} failed: see above")


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(f"make test: {error}")
