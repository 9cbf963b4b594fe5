"""Everything that can break, broken under load: which requests it costs, and that all is well again.

`make faults` runs all of it, `make test` the rows that are quick. Each row writes its timeline to results/.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from group_data import all as knobs
from tests.faults.faults import DISK_FULL, FAULTS, NOTHING, Fault, cannot, do
from tests.faults.timeline import Timeline
from tests.lab import hosts
from tests.lab.test_proxies import VIP, settled
from tests.lab.test_release import SICK, copy_of_app

pytestmark = [
    pytest.mark.skipif(hosts.SETTINGS.provider != "docker", reason="reaches into Docker's hosts without SSH"),
    pytest.mark.once,
]
VERSIONS = ("0.0.2", "0.0.3")
COUNT = knobs.app_count if hosts.SCHEDULER == "nomad" else len(hosts.names("workers"))
WHOLE_S = 240
CASES = [
    pytest.param(
        fault,
        moment,
        id=f"{fault.name}, {moment}",
        marks=[] if fault.quick == moment else pytest.mark.slow,
    )
    for fault in FAULTS
    for moment, tried in (("idle", fault.idle), ("release", fault.release is not None))
    if tried
]


@pytest.mark.parametrize(("fault", "moment"), CASES)
def test_fault(fault: Fault, moment: str, running: str) -> None:
    if reason := cannot(fault):
        pytest.skip(reason)
    name = fault.name if moment == "idle" else f"{fault.name} during a release"
    with Timeline(name, {*VERSIONS, running}) as timeline:
        timeline.go_on(5)
        if moment == "idle":
            with broken(fault, timeline) as at:
                timeline.go_on(fault.stays_s)
        else:
            at = during_a_release(fault, timeline, other_than(running))
        until_whole(timeline)
    assert not (bad := timeline.not_excused(fault.may_fail, at)), f"{len(bad)} failed, like {bad[0]}"
    assert timeline.saw(fault.sign, at), f"nothing like {fault.sign!r} in {timeline.events}"


@contextmanager
def broken(fault: Fault, timeline: Timeline) -> Iterator[float]:
    """Break it, yield when that was, and mend it."""
    where = fault.where()
    timeline.mark(f"{fault.name} ({', '.join(where)})")
    try:
        yield timeline.since_begin(do(where, fault.breaks))
    finally:
        if fault.mends:
            timeline.mark("mended")
            do(where, fault.mends)


def during_a_release(fault: Fault, timeline: Timeline, version: str) -> float:
    """Break it as soon as the first new instance answers, and see the release end as it should."""
    timeline.mark(f"release of {version}")
    with ThreadPoolExecutor(1) as pool:
        release = pool.submit(hosts.pyinfra, "release.py", "--data", f"version={version}")
        new = lambda: release.done() or timeline.load.result.versions[version]  # noqa: E731
        hosts.wait_for(f"{version} to answer", new, 180)
        with broken(fault, timeline) as at:
            run = release.result()
            timeline.mark(f"release ended with {run.code}")
            assert run.code == fault.release, run.output
            assert hosts.running_version() == version
    if run.code and hosts.SCHEDULER == "docker":
        # What the worker ran when it was lost, Docker starts again: the run has said what to do.
        assert run.lines("Repair it and release again"), run.output
        timeline.mark("release again")
        again = hosts.pyinfra("release.py", "--data", f"version={version}")
        assert again.code == 0, again.output
    return at


def until_whole(timeline: Timeline) -> None:
    hosts.wait_for("the cluster to be whole", lambda: len(hosts.whole() or ()) == COUNT, WHOLE_S)
    if VIP:
        settled()
    timeline.mark("whole")
    timeline.go_on(5)


def other_than(version: str) -> str:
    return next(name for name in VERSIONS if name != version)


# Planned work, and releases that cannot succeed


def planned(name: str, versions: set[str], code: int, script: str, *arguments: str) -> hosts.Run:
    """Run it under load: it ends as it should, and no request is lost."""
    with Timeline(name, versions) as timeline:
        timeline.go_on(5)
        timeline.mark(" ".join([script, *arguments[:2]][:3]))
        run = hosts.pyinfra(script, *arguments)
        timeline.mark(f"ended with {run.code}")
        until_whole(timeline)
    assert run.code == code, run.output
    assert not (bad := timeline.not_excused(NOTHING, 0)), f"{len(bad)} failed, like {bad[0]}"
    return run


@pytest.mark.slow
def test_release_and_rollback(running: str) -> None:
    other = other_than(running)
    planned("Release", {running, other}, 0, "release.py", "--data", f"version={other}")
    assert hosts.running_version() == other
    planned("Rollback", {running, other}, 0, "rollback.py")
    assert hosts.running_version() == running


@pytest.mark.slow
@pytest.mark.parametrize("kind", SICK)
def test_sick_image(kind: str, running: str, tmp_path: Path) -> None:
    source, sick, _ = SICK[kind]
    name = {"crash": "Image that crashes", "mute": "Image that is never healthy"}[kind]
    arguments = changed_app(tmp_path, kind, source, sick)
    planned(name, {running}, 1, "release.py", *arguments, "--data", "app_healthy_deadline_s=12")
    assert hosts.running_version() == running


@pytest.mark.slow
def test_full_disk(running: str, tmp_path: Path) -> None:
    """A worker cannot take the new image: nothing is released."""
    arguments = changed_app(tmp_path, "disk", '_plain("OK\\n")', '_plain("OK" + "\\n")')
    with Timeline(DISK_FULL.name, {running}) as timeline:
        timeline.go_on(5)
        with broken(DISK_FULL, timeline) as at:
            run = hosts.pyinfra("release.py", *arguments)
            timeline.mark(f"release ended with {run.code}")
        until_whole(timeline)
    assert run.code == DISK_FULL.release, run.output
    assert run.lines("cannot be pulled: .*no space left on device"), run.output
    assert hosts.running_version() == running
    assert not (bad := timeline.not_excused(NOTHING, at)), f"{len(bad)} failed, like {bad[0]}"


def changed_app(target: Path, kind: str, old: str, new: str) -> list[str]:
    """release.py's arguments for the app with one change, as a version that is named after what it is."""
    folder = copy_of_app(target, old, new)
    digest = hashlib.sha256((folder / "app.py").read_bytes()).hexdigest()[:8]
    return ["--data", f"version=0.1.0-{kind}.h{digest}", "--data", f"app_folder={folder}"]
