"""release.py through pyinfra's real engine on @fake hosts: order, what is left out, what is refused."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.conftest import Run
from tests.unit.fake import world

Pyinfra = Callable[..., Run]
WORKERS = ["worker-01", "worker-02", "worker-03"]
DIGEST = "sha256:" + 64 * "a"
EVERYWHERE = {name: {"0.0.2": DIGEST} for name in WORKERS}
WORLD = {"registries": EVERYWHERE, "running": ["0.0.2"], "pulled": WORKERS}


def release(pyinfra: Pyinfra, version: str, *arguments: str, **world: object) -> Run:
    return pyinfra("release.py", "--data", f"version={version}", *arguments, **world)


def steps(run: Run) -> list[str]:
    return [
        line.split()[0]
        for line in run.journal
        if line.split()[0] in ("build", "push", "fetch", "pull", "roll", "prune")
    ]


def lines(run: Run, pattern: str) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", run.stderr)
    return [line.strip() for line in plain.splitlines() if re.search(pattern, line)]


def assert_refused(run: Run, pattern: str) -> None:
    """One line, exit code 1, nothing was done to any host."""
    assert (run.code, len(lines(run, pattern)), run.journal) == (1, 1, []), run.stderr
    assert "Traceback" not in run.stderr


def test_a_new_version_is_built_once_copied_pulled_rolled_and_verified(pyinfra: Pyinfra) -> None:
    run = release(pyinfra, "0.0.3", **{**WORLD, "pulled": []})
    assert run.code == 0, run.stderr
    assert steps(run) == ["build", "push", "fetch", "fetch", "pull", "pull", "pull", "roll"]
    assert run.done("build") == run.done("push") == ["worker-03"]
    assert sorted(run.done("fetch")) == ["worker-01", "worker-02"]
    assert sorted(run.done("pull")) == WORKERS
    assert run.done("roll") == ["worker-01"]
    assert run.journal[-1] == "verify proxy-01 0.0.3"


def test_the_same_again_changes_nothing_and_says_so(pyinfra: Pyinfra) -> None:
    run = release(pyinfra, "0.0.2", **WORLD)
    assert (run.code, run.changed(), steps(run)) == (0, {}, []), run.stderr
    assert lines(run, "0.0.2 runs as it should: nothing to do")


def test_another_count_is_released_with_the_same_version(pyinfra: Pyinfra) -> None:
    run = release(pyinfra, "0.0.2", "--data", "app_count=4", **WORLD)
    assert (run.code, steps(run)) == (0, ["roll"]), run.stderr


def test_an_interrupted_release_is_finished(pyinfra: Pyinfra) -> None:
    """Built and copied to one worker before it was interrupted: only what is missing is done."""
    registries = {**EVERYWHERE, "worker-03": {"0.0.3": DIGEST}, "worker-01": {"0.0.3": DIGEST}}
    world = {**WORLD, "registries": registries, "pulled": ["worker-03"]}
    run = release(pyinfra, "0.0.3", **world)
    assert (run.code, steps(run)) == (0, ["fetch", "pull", "pull", "roll"]), run.stderr
    again = release(pyinfra, "0.0.3")
    assert (again.code, again.changed()) == (0, {})


def test_a_released_version_keeps_its_image(pyinfra: Pyinfra) -> None:
    run = release(pyinfra, "0.0.2", **{**WORLD, "running": ["0.0.1"], "source": "other"})
    assert (run.code, steps(run)) == (0, ["roll"]), run.stderr
    assert len(lines(run, "0.0.2: released before from other source; its existing image is used")) == 1


def test_the_running_version_from_changed_source_is_refused(pyinfra: Pyinfra) -> None:
    assert_refused(
        release(pyinfra, "0.0.2", **WORLD, source="other"), "0.0.2: runs already.*choose a new version"
    )


@pytest.mark.parametrize("version", ["1.10", "1.2.3+4", "latest"])
def test_a_version_that_is_none_is_refused(pyinfra: Pyinfra, version: str) -> None:
    assert_refused(release(pyinfra, version, **WORLD), "--data version=0.0.3")


def test_a_missing_version_is_refused(pyinfra: Pyinfra) -> None:
    assert_refused(pyinfra("release.py", **WORLD), "version: missing")


def test_a_silent_registry_is_refused(pyinfra: Pyinfra) -> None:
    run = release(pyinfra, "0.0.3", **WORLD, silent=["worker-02"])
    assert_refused(run, r"worker-02: its registry does not answer \(connection refused\).*--exclude")


def test_no_room_is_refused_before_anything_is_built(pyinfra: Pyinfra) -> None:
    run = release(pyinfra, "0.0.3", **{**WORLD, "no room": "Nomad cannot place it: too little memory"})
    assert_refused(run, "0.0.3: Nomad cannot place it")


def test_different_images_of_one_version_are_refused(pyinfra: Pyinfra) -> None:
    registries = {**EVERYWHERE, "worker-02": {"0.0.2": "sha256:" + 64 * "b"}}
    assert_refused(release(pyinfra, "0.0.2", **{**WORLD, "registries": registries}), "hold different images")


def test_another_worker_builds_where_the_builder_takes_no_part(pyinfra: Pyinfra) -> None:
    run = release(pyinfra, "0.0.3", "--exclude", "@fake/worker-03", **WORLD)
    assert (run.code, run.done("build"), run.done("push")) == (0, ["worker-01"], ["worker-01"]), run.stderr
    assert lines(run, "worker-03, the builder, is not in this run: .*worker-01 builds 0.0.3")


def test_another_worker_builds_when_the_builder_is_lost_at_it(pyinfra: Pyinfra) -> None:
    run = release(pyinfra, "0.0.3", **WORLD, **{"lost at build": ["worker-03"]})
    assert (run.code, run.done("push"), run.done("verify")) == (1, ["worker-01"], ["proxy-01"]), run.stderr
    assert lines(run, "worker-03 is lost: .*worker-01 builds 0.0.3")


def test_a_released_version_needs_no_builder(pyinfra: Pyinfra) -> None:
    run = release(pyinfra, "0.0.2", "--exclude", "@fake/worker-03", **{**WORLD, "running": ["0.0.1"]})
    assert (run.code, steps(run)) == (0, ["roll"]), run.stderr


def test_a_run_without_workers_is_refused(pyinfra: Pyinfra) -> None:
    run = release(pyinfra, "0.0.3", "--limit", "@fake/proxy-01", **WORLD)
    assert_refused(run, "no worker takes part in this run: correct --limit or --exclude")


def test_a_build_that_fails_releases_nothing(pyinfra: Pyinfra) -> None:
    run = release(pyinfra, "0.0.3", **{**WORLD, "build fails": "COPY failed: no such file"})
    assert (run.code, steps(run)) == (1, ["build"])
    assert len(lines(run, r"0.0.3 is not built: COPY failed: no such file\. Nothing was released")) == 1


def test_a_worker_that_cannot_take_the_image_ends_the_release(pyinfra: Pyinfra) -> None:
    run = release(pyinfra, "0.0.3", **WORLD, full=["worker-02"])
    assert (run.code, run.done("pull"), run.done("roll")) == (1, [], [])
    assert len(lines(run, "worker-02.*no space left on device; nothing was released")) == 1


def test_a_worker_that_is_lost_on_the_way_does_not(pyinfra: Pyinfra) -> None:
    """worker-01 would have led; the next one does. The exit code still says that somebody must look."""
    run = release(pyinfra, "0.0.3", **WORLD, lost=["worker-01"])
    assert (run.code, run.done("roll"), run.done("verify")) == (1, ["worker-02"], ["proxy-01"]), run.stderr
    assert len(lines(run, "worker-01.*it is lost")) == 1


def test_a_failed_roll_is_the_end(pyinfra: Pyinfra) -> None:
    fault = "not released: unhealthy on worker-02; 0.0.2 serves as before"
    run = release(pyinfra, "0.0.3", **{**WORLD, "roll fails": fault})
    assert (run.code, run.done("roll"), run.done("verify")) == (1, ["worker-01"], [])
    assert len(lines(run, f"0.0.3: {fault}")) == 1


def trail() -> list[tuple[str, str]]:
    """(version, result) of each entry of the audit trail."""
    return [(entry["version"], entry["result"]) for entry in world.load()["trail"]]


@pytest.fixture
def world_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "FOLDER", tmp_path)


@pytest.mark.usefixtures("world_here")
def test_the_audit_trail_tells_how_each_release_ended(pyinfra: Pyinfra) -> None:
    assert release(pyinfra, "0.0.3", **WORLD).code == 0
    assert trail() == [("0.0.3", "in service")]
    assert release(pyinfra, "0.0.3").changed() == {}
    assert trail() == [("0.0.3", "in service")]
    world.save({**world.load(), "roll fails": "unhealthy on worker-02"})
    assert release(pyinfra, "0.0.4").code == 1
    assert trail() == [("0.0.3", "in service"), ("0.0.4", "failed: unhealthy on worker-02")]


@pytest.mark.usefixtures("world_here")
def test_what_was_in_service_and_is_gone_is_not_built_again(pyinfra: Pyinfra) -> None:
    assert release(pyinfra, "0.0.3", **WORLD).code == 0
    world.save({**world.load(), "registries": {}})
    assert_refused(release(pyinfra, "0.0.3"), "0.0.3: was in service before, and no registry .* choose a new")


@pytest.mark.usefixtures("world_here")
def test_old_versions_go_after_a_release(pyinfra: Pyinfra) -> None:
    """0.0.1 is what Nomad remembers as the version before, 0.0.0 older, and 0.0.2 was never healthy."""
    old = {f"0.0.{n}": f"sha256:{n}" for n in (0, 1, 2)}
    registries = {name: old | {"0.0.3": DIGEST} for name in WORKERS}
    now = {**WORLD, "registries": registries, "running": ["0.0.1"], "stable": ["0.0.1", "0.0.0"]}
    run = release(pyinfra, "0.0.3", "--data", "registry_keep_versions=2", **now)
    assert (run.code, run.done("prune")) == (0, WORKERS), run.stderr
    assert set(world.load()["registries"]["worker-01"]) == {"0.0.1", "0.0.3"}
    again = release(pyinfra, "0.0.3", "--data", "registry_keep_versions=2")
    assert (again.code, again.changed()) == (0, {}), again.stderr


def test_to_keep_less_than_the_version_before_is_refused(pyinfra: Pyinfra) -> None:
    run = release(pyinfra, "0.0.3", "--data", "registry_keep_versions=1", **WORLD)
    assert_refused(run, "registry_keep_versions=1: choose a number from 2 on")


@pytest.mark.usefixtures("world_here")
def test_a_release_that_does_not_reach_its_roll_is_in_the_trail_too(pyinfra: Pyinfra) -> None:
    assert release(pyinfra, "0.0.3", **{**WORLD, "build fails": "COPY failed"}).code == 1
    assert trail() == [("0.0.3", "failed or interrupted: see its output")]


def test_a_version_that_every_worker_holds_needs_no_registry(pyinfra: Pyinfra) -> None:
    run = release(pyinfra, "0.0.1", **WORLD, silent=WORKERS, held=["0.0.1"])
    assert (run.code, steps(run)) == (0, ["roll"]), run.stderr
