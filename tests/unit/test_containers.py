"""The docker scheduler's roll against workers that only pretend: what they serve is checked at each step."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks import cluster, containers, secrets
from tasks.containers import Release

OLD = Release("0.0.2", "sha256:old")
NEW = Release("0.0.3", "sha256:new")
SECRET = 'it\'s "secret" $HOME'


class Clock:
    """Time passes only while somebody waits."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Worker:
    """A host with Docker and a Consul agent: answers the commands of tasks/containers.py, and no other."""

    def __init__(self, name: str, clock: Clock, **data: object) -> None:
        self.name, self.print_prefix, self.clock = name, f"[{name}] ", clock
        self.containers: dict[str, dict[str, Any]] = {}
        self.file = ""
        self.secrets: dict[str, str] = {}  # path -> content
        self.catalog: dict[str, str] = {}  # service ID -> version
        self.left: dict[str, float] = {}  # service ID -> when it left Consul
        self.sick: set[str] = set()  # versions that never become healthy
        self.crashing: set[str] = set()
        self.commands: list[str] = []
        self.interrupt: Callable[[str], bool] = lambda command: False
        self.lost_at = ""  # a part of the command at which the worker vanishes
        self.lost = False
        self.served = False
        self.data = SimpleNamespace(
            secure=False,
            dict=dict,  # pyinfra's has all data; shell.run takes the connector's arguments from it
            **{
                "address": "192.168.56.11",
                "app_name": "app",
                "app_ports": [20001, 20002],
                "app_port": 8000,
                "app_health_path": "/status",
                "app_env": {"PASSWORD": SECRET},
                "app_secrets": [],
                "app_secrets_as": "environment",
                "app_user": "10001:10001",
                "app_cpu_mhz": 100,
                "app_memory_mb": 128,
                "app_pids_limit": 256,
                "app_min_healthy_s": 10,
                "app_healthy_deadline_s": 60,
                "app_shutdown_delay_s": 15,
                "app_kill_timeout_s": 25,
                "registry_port": 5000,
                "registry_image": "hashistack/registry:2",
                "roll_deadline_s": 30,
                **data,
            },
        )

    def run_shell_command(
        self, command: str, _sudo: bool = False, _stdin: str | None = None
    ) -> tuple[bool, SimpleNamespace]:
        self.lost = self.lost or bool(self.lost_at and self.lost_at in command)
        if self.lost:
            raise OSError("No route to host")
        if self.interrupt(command):
            raise KeyboardInterrupt
        self.commands.append(command)
        try:
            lines, error = self.answer(command, _stdin), ""
        except RuntimeError as refused:
            lines, error = [], str(refused)
        self.check()
        return not error, SimpleNamespace(stdout_lines=lines, stderr_lines=[error] if error else [])

    def answer(self, command: str, stdin: str | None) -> list[str]:
        if command.startswith("umask"):
            return self.write(stdin or "")
        if command.startswith("! test -e"):
            return self.file.splitlines()
        if command.startswith("install -d -m 700"):
            self.secrets[command.split("mv -T ")[1].split()[1]] = stdin or ""
            return []
        words = shlex.split(command.removeprefix("cat | "))
        if words[:2] == ["docker", "ps"]:
            return [
                "|".join([c["state"], c["created"], *c["labels"].values()]) for c in self.containers.values()
            ]
        if words[:2] == ["docker", "run"]:
            return self.run(words, stdin or "")
        if words[:2] == ["docker", "inspect"]:
            return [f"{3 if self.containers[words[-1]]['version'] in self.crashing else 0} 1 false"]
        if words[:2] == ["docker", "logs"]:
            return ["no database"]
        if words[:2] == ["docker", "stop"]:
            self.stop(words[-1])
        elif words[:2] == ["docker", "start"]:
            self.containers[words[-1]]["state"] = "running"
        elif "docker rm --force" in command:
            self.containers.pop(command.split("--force ")[1].split()[0], None)
        elif command != "true":
            raise AssertionError(f"unexpected: {command}")
        return []

    def write(self, text: str) -> list[str]:
        self.file = text
        if self.interrupt("reload"):
            raise KeyboardInterrupt
        catalog = {s["id"]: s["meta"]["version"] for s in json.loads(text)["services"]}
        self.left |= {name: self.clock.now for name in self.catalog if name not in catalog}
        self.catalog = catalog
        return []

    def run(self, words: list[str], stdin: str) -> list[str]:
        assert f"PASSWORD={SECRET}\n" in stdin and SECRET not in " ".join(words)
        if words[-1].endswith("missing"):
            raise RuntimeError("docker: manifest unknown")
        labels = dict(
            word.removeprefix("--label=hashistack.").split("=", 1) for word in words if "label" in word
        )
        name = next(word for word in words if word.startswith("--name=")).removeprefix("--name=")
        assert name not in self.containers
        self.containers[name] = {
            "state": "running",
            "created": f"{self.clock.now}",
            "labels": labels,
            "version": labels["version"],
        }
        return []

    def stop(self, name: str) -> None:
        if self.healthy(name):
            waited = self.clock.now - self.left.get(name, 0)
            assert name not in self.catalog and waited >= self.data.app_shutdown_delay_s
        self.containers[name]["state"] = "exited"

    def healthy(self, name: str) -> bool:
        container = self.containers.get(name, {"state": "absent"})
        return container["state"] == "running" and container["version"] not in self.sick | self.crashing

    def check(self) -> None:
        """A worker that has served once always has a healthy instance in Consul."""
        serves = any(self.healthy(name) for name in self.catalog)
        assert serves or not self.served, f"{self.name} serves nothing: {self.commands[-3:]}"
        self.served = serves

    def runs(self) -> list[str]:
        return [c["version"] for c in self.containers.values() if c["state"] == "running"]


class Consul:
    """The two calls of python-consul2 that are used."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.health = self.agent = self

    def service(self, name: str) -> tuple[int, list[dict[str, Any]]]:
        return 1, [
            {
                "Node": {"Node": self.worker.name},
                "Service": {"ID": each},
                "Checks": [{"Status": self.status(each)}],
            }
            for each in self.worker.catalog
        ]

    def checks(self) -> dict[str, dict[str, str]]:
        return {each: {"ServiceID": each, "Output": "HTTP 500"} for each in self.worker.catalog}

    def status(self, name: str) -> str:
        return "passing" if self.worker.healthy(name) else "critical"


@contextmanager
def _consul(worker: Worker) -> Iterator[Consul]:
    yield Consul(worker)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cluster, "time", clock)
    monkeypatch.setattr(containers, "time", clock)
    monkeypatch.setattr(containers, "consul_api", _consul)
    return clock


@pytest.fixture
def workers(clock: Clock) -> list[Worker]:
    """Three workers that serve 0.0.2."""
    three = [Worker(f"worker-{n:02d}", clock) for n in (1, 2, 3)]
    assert roll(three, OLD) == containers.Outcome()
    return three


def roll(workers: list[Worker], release: Release) -> containers.Outcome:
    return containers.roll(containers.outdated(workers, release), release)  # type: ignore[arg-type]


def versions(workers: list[Worker]) -> list[list[str]]:
    return [worker.runs() for worker in workers]


def test_replaces_one_worker_after_the_other(workers: list[Worker]) -> None:
    old, both, new = ["0.0.2"], ["0.0.2", "0.0.3"], ["0.0.3"]
    stages: list[list[list[str]]] = []

    def look(command: str) -> bool:
        stage = [sorted(worker) for worker in versions(workers)]
        if stage not in stages:
            stages.append(stage)
        return False

    for worker in workers:
        worker.interrupt = look
    assert roll(workers, NEW) == containers.Outcome()
    assert stages == [
        [old, old, old],
        [both, old, old],
        [new, old, old],
        [new, both, old],
        [new, new, old],
        [new, new, both],
    ]
    assert versions(workers) == [new] * 3


def test_second_run_has_nothing_to_do(workers: list[Worker]) -> None:
    assert containers.outdated(workers, OLD) == []  # type: ignore[arg-type]
    assert containers.running_versions(workers[0]) == {"0.0.2"}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [{"app_env": {"PASSWORD": SECRET, "MODE": "b"}}, {"app_memory_mb": 256}, {"app_health_path": "/up"}],
)
def test_changed_settings_are_released_with_the_same_version(
    workers: list[Worker], change: dict[str, Any]
) -> None:
    for worker in workers:
        vars(worker.data).update(change)
    assert len(containers.outdated(workers, OLD)) == 3  # type: ignore[arg-type]
    assert roll(workers, OLD).fault is None
    assert versions(workers) == [["0.0.2"]] * 3
    assert containers.outdated(workers, OLD) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["sick", "crashing"])
@pytest.mark.parametrize("at", [0, 2])
def test_unhealthy_version_goes_back_everywhere(workers: list[Worker], how: str, at: int) -> None:
    getattr(workers[at], how).add("0.0.3")
    fault = roll(workers, NEW).fault or ""
    assert workers[at].name in fault and "no database" in fault
    assert versions(workers) == [["0.0.2"]] * 3
    assert containers.outdated(workers, OLD) == []  # type: ignore[arg-type]
    assert [len(worker.containers) for worker in workers] == [1] * 3


def test_failure_elsewhere_leaves_what_ran_before_this_run(workers: list[Worker]) -> None:
    """worker-01 runs the new version already and is only out of Consul: it must never end with nothing."""
    roll(workers[:1], NEW)
    workers[0].served = False
    workers[0].write(json.dumps({"services": []}))
    workers[1].sick.add("0.0.3")
    assert roll(workers, NEW).fault
    assert versions(workers) == [["0.0.3"], ["0.0.2"], ["0.0.2"]]
    assert set(workers[0].catalog.values()) == {"0.0.3"}


def test_missing_image_changes_nothing(workers: list[Worker]) -> None:
    outcome = roll(workers, Release("0.0.3", "sha256:missing"))
    assert outcome.fault == "worker-01: docker: manifest unknown"
    assert containers.outdated(workers, OLD) == []  # type: ignore[arg-type]


def test_failed_first_release_leaves_nothing(clock: Clock) -> None:
    workers = [Worker(f"worker-{n:02d}", clock) for n in (1, 2)]
    workers[1].crashing.add("0.0.2")
    workers[0].check = lambda: None  # type: ignore[method-assign]
    assert "exit code 1" in (roll(workers, OLD).fault or "")
    assert versions(workers) == [[], []]


@pytest.mark.parametrize("at", ["docker run", "docker stop", "umask"])
def test_lost_worker_is_left_and_the_others_are_released(workers: list[Worker], at: str) -> None:
    workers[1].lost_at = at
    assert roll(workers, NEW) == containers.Outcome(lost=["worker-02"])
    assert [workers[0].runs(), workers[2].runs()] == [["0.0.3"]] * 2


def test_all_workers_lost_is_a_failure(workers: list[Worker]) -> None:
    for worker in workers:
        worker.lost_at = "umask"
    assert roll(workers, NEW).fault == "every worker was lost"


def _interrupt_after(workers: list[Worker], steps: int) -> None:
    left = iter(range(steps))
    for worker in workers:
        worker.interrupt = lambda command: next(left, None) is None


@pytest.mark.parametrize("then", [NEW, OLD, Release("0.0.4", "sha256:newer")], ids=lambda r: r.version)
def test_interrupted_anywhere_the_next_run_converges(clock: Clock, then: Release) -> None:
    """Every step of a release is a place to be killed; what serves is checked by the workers themselves."""
    for steps in range(1000):
        workers = [Worker(f"worker-{n:02d}", clock) for n in (1, 2)]
        roll(workers, OLD)
        todo = containers.outdated(workers, NEW)  # type: ignore[arg-type]
        _interrupt_after(workers, steps)
        try:
            containers.roll(todo, NEW)
        except KeyboardInterrupt:
            finished = False
        else:
            finished = True
        for worker in workers:
            worker.interrupt = lambda command: False
        assert roll(workers, then).fault is None
        assert versions(workers) == [[then.version]] * 2
        assert containers.outdated(workers, then) == []  # type: ignore[arg-type]
        if finished:
            assert steps > 15
            return
    pytest.fail("the release never ended")


def test_docker_restart_takes_the_worker_out_and_back(workers: list[Worker]) -> None:
    worker = workers[0]
    worker.served = False
    worker.check = lambda: None  # type: ignore[method-assign]
    before = worker.clock.now
    assert containers.pause(worker) is None  # type: ignore[arg-type]
    assert worker.catalog == {} and worker.runs() == ["0.0.2"]
    assert containers._paused(worker)  # type: ignore[arg-type]
    assert worker.clock.now - before >= worker.data.app_shutdown_delay_s
    assert containers.resume(worker) is None  # type: ignore[arg-type]
    assert containers.outdated(workers, OLD) == []  # type: ignore[arg-type]


def test_secrets_as_a_file_are_in_no_argument_and_not_in_the_environment(
    workers: list[Worker], tmp_path: Path
) -> None:
    secrets.write(tmp_path, "app.env", "KEY=one")
    vars(workers[0].data).update(secrets_folder=str(tmp_path), app_secrets=["KEY"], app_secrets_as="file")
    assert roll(workers[:1], NEW).fault is None
    assert workers[0].secrets == {"/etc/hashistack/secrets/app-green.env": "KEY=one\n"}
    (run,) = [command for command in workers[0].commands if "0.0.3" in command and "docker run" in command]
    assert "source=/etc/hashistack/secrets/app-green.env,target=/secrets/app.env,readonly" in run
    assert "one" not in run


def test_a_changed_secret_is_released_with_the_same_version(workers: list[Worker], tmp_path: Path) -> None:
    secrets.write(tmp_path, "app.env", "KEY=one")
    for worker in workers:
        vars(worker.data).update(secrets_folder=str(tmp_path), app_secrets=["KEY"])
    assert roll(workers, NEW).fault is None
    assert containers.outdated(workers, NEW) == []  # type: ignore[arg-type]
    secrets.write(tmp_path, "app.env", "KEY=two")
    assert len(containers.outdated(workers, NEW)) == 3  # type: ignore[arg-type]


def test_line_break_in_the_environment_is_refused(workers: list[Worker]) -> None:
    workers[0].data.app_env = {"A": "one\ntwo"}
    assert "app_env" in (roll(workers[:1], NEW).fault or "")
    assert workers[0].runs() == ["0.0.2"]


def test_registry_is_published_on_loopback_and_the_private_address_only() -> None:
    arguments = containers.registry_arguments(Worker("worker-01", Clock()).data)  # type: ignore[arg-type]
    assert [word for word in arguments if "publish" in word] == [
        "--publish=127.0.0.1:5000:5000",
        "--publish=192.168.56.11:5000:5000",
    ]


def test_once_the_lock_is_lost_no_further_worker_is_begun_and_none_goes_back(workers: list[Worker]) -> None:
    halted = "the lock was lost"
    outcome = containers.roll(
        workers,  # type: ignore[arg-type]
        NEW,
        lambda: halted if workers[0].runs() == ["0.0.3"] else None,
    )
    assert outcome.fault == halted
    assert versions(workers) == [["0.0.3"], ["0.0.2"], ["0.0.2"]]
