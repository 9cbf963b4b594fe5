"""Order through pyinfra's real engine on @fake hosts, and the fact that decides what is stale."""

import os
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tasks import rolling
from tests.unit.conftest import Run

STALE = {"worker-01": "stale", "worker-02": "stale", "worker-03": "stale"}
Pyinfra = Callable[..., Run]


def test_the_sick_first_and_the_leader_last(pyinfra: Pyinfra) -> None:
    run = pyinfra("roll.py", state=STALE, leader="worker-01", sick=["worker-03"])
    assert (run.code, run.done("restart")) == (0, ["worker-03", "worker-02", "worker-01"])


def test_a_leader_that_moves_is_still_last(pyinfra: Pyinfra) -> None:
    moves = {"worker-02": "worker-03"}  # when worker-02 restarts, worker-03 becomes the leader
    run = pyinfra("roll.py", state=STALE, leader="worker-01", **{"leader after": moves})
    assert (run.code, run.done("restart")) == (0, ["worker-02", "worker-01", "worker-03"])


def test_the_next_one_waits_until_this_one_is_well(pyinfra: Pyinfra) -> None:
    run = pyinfra("roll.py", state=STALE, leader="worker-03", slow=1)
    steps = [line.split()[:2] for line in run.journal if not line.startswith(("asked", "shell"))]
    each = ["gate", "restart", "unwell", "well"]
    assert steps == [[what, host] for host in STALE for what in each]


def test_it_stops_at_the_first_one_that_does_not_recover(pyinfra: Pyinfra) -> None:
    run = pyinfra("roll.py", "--data", "roll_deadline_s=0", state=STALE, lost=["worker-02"])
    assert (run.code, run.done("restart"), run.done("shell")) == (1, ["worker-01", "worker-02"], [])
    assert run.errors() == [
        "[@fake/worker-02] consul: not a healthy voter; see journalctl -u consul there."
        " No further host is touched."
    ]


def test_a_restart_that_fails_stops_it_too(pyinfra: Pyinfra) -> None:
    run = pyinfra("roll.py", state=STALE, **{"restart fails": ["worker-01"]})
    assert (run.code, run.done("restart"), run.done("shell")) == (1, ["worker-01"], [])
    assert len(run.errors()) == 1
    assert "systemctl restart consul: Job for consul.service failed.; see journalctl" in run.errors()[0]


def test_nothing_is_restarted_behind_a_closed_gate(pyinfra: Pyinfra) -> None:
    gate = {"worker-01": "no server can be spared (failure tolerance 0)"}
    run = pyinfra("roll.py", "--data", "roll_deadline_s=0", state=STALE, gate=gate)
    assert (run.code, run.done("restart"), run.done("shell")) == (1, [], [])
    assert run.errors() == [
        "[@fake/worker-01] consul: not restarted, no server can be spared (failure tolerance 0);"
        " repair that first or add --data accept_outage=true. No further host is touched."
    ]


def test_a_gate_that_never_opens_is_not_waited_for(pyinfra: Pyinfra) -> None:
    run = pyinfra("roll.py", state=STALE, hopeless="with fewer than 3 servers none can be spared")
    assert (run.code, run.done("gate"), run.done("restart")) == (1, ["worker-01"], [])
    assert "not restarted, with fewer than 3 servers none can be spared; repair that first" in run.errors()[0]


def test_an_api_that_is_silent_is_one_line_and_no_traceback(pyinfra: Pyinfra) -> None:
    run = pyinfra("roll.py", state=STALE, silent=["worker-01"])
    assert (run.code, run.done("restart"), "Traceback" in run.stderr) == (1, [], False)
    assert run.errors() == [
        "[@fake/worker-01] consul: no answer (connection reset). No further host is touched."
    ]


def test_one_that_cannot_be_ranked_comes_first(pyinfra: Pyinfra) -> None:
    run = pyinfra("roll.py", state=STALE, **{"no rank": ["worker-02"]})
    assert (run.code, run.done("restart")[0]) == (0, "worker-02")


def test_nothing_stale_is_no_change(pyinfra: Pyinfra) -> None:
    run = pyinfra("roll.py", state={"worker-01": "fresh", "worker-02": "stopped"})
    assert (run.code, run.done("gate"), run.done("restart")) == (0, [], [])
    assert list(run.changed()) == ["Go on"]


def test_an_interrupted_run_converges(pyinfra: Pyinfra) -> None:
    """Neither run writes a file: what the hosts run with decides."""
    first = pyinfra("roll.py", state=STALE, leader="worker-01", **{"killed before": "worker-03"})
    assert (first.code, first.done("restart")) == (-9, ["worker-02"])
    again = pyinfra("roll.py", state={**STALE, "worker-02": "fresh"}, leader="worker-01")
    assert (again.code, again.done("restart")) == (0, ["worker-03", "worker-01"])
    third = pyinfra("roll.py")
    assert (third.code, third.done("restart"), list(third.changed())) == (0, [], ["Go on"])


def test_only_the_hosts_of_this_run_are_touched(pyinfra: Pyinfra) -> None:
    run = pyinfra("roll.py", "--limit", "@fake/worker-02", state=STALE)
    assert (run.code, run.done("asked"), run.done("restart")) == (0, ["worker-02"], ["worker-02"])


def test_other_hosts_are_asked_and_restarted_with_sudo(pyinfra: Pyinfra) -> None:
    """The operation runs on one host; group_data's _sudo must reach the others all the same."""
    run = pyinfra("roll.py", state=STALE)
    assert {line.split()[2] for line in run.journal if line.startswith(("asked", "restart"))} == {"sudo"}


def test_a_stopped_one_is_started_and_a_running_one_left_alone(pyinfra: Pyinfra) -> None:
    state = {"worker-01": "stopped", "worker-02": "stale", "worker-03": "fresh", "proxy-01": "fresh"}
    run = pyinfra("start.py", state=state)
    assert run.code == 0
    assert run.changed() == {
        "Start Consul where it is stopped": ["@fake/worker-01"],
        "Restart the journal if stale": ["@fake/worker-02"],
    }


def test_waiting_ends_when_all_is_well(pyinfra: Pyinfra) -> None:
    run = pyinfra("wait.py", missing=["no leader yet", "no leader yet"])
    assert (run.code, len(run.done("fault"))) == (0, 3)
    assert "Wait until Consul has a leader" in run.changed()


def test_healthy_at_once_is_no_change(pyinfra: Pyinfra) -> None:
    run = pyinfra("wait.py", missing=[])
    assert (run.code, list(run.changed())) == (0, ["Go on"])


def test_waiting_in_vain_ends_the_run(pyinfra: Pyinfra) -> None:
    run = pyinfra("wait.py", "--data", "roll_deadline_s=0", missing=["no leader yet"] * 9)
    assert (run.code, run.done("shell")) == (1, [])
    assert len(run.errors()) == 1
    assert "a Consul leader: no leader yet, after 0 s; see journalctl there" in run.errors()[0]


@pytest.mark.parametrize(("careless", "reached"), [("false", 0), ("true", 3)])
def test_a_host_that_fails_ends_the_run(pyinfra: Pyinfra, careless: str, reached: int) -> None:
    """Without preflight's operation pyinfra goes on with the other three: the test can tell."""
    run = pyinfra("fail.py", "--data", f"careless={careless}", **{"fails: first": ["worker-02"]})
    assert len([line for line in run.journal if line.endswith("second")]) == reached
    assert run.code == 1


# UnitState: its own shell command, against a stub of systemctl and real files.

START = datetime(2026, 11, 25, 1, 3, 5, 788108, tzinfo=UTC)  # printed so by Debian 12's systemctl
START_NS = int(START.timestamp()) * 10**9 + START.microsecond * 1000
SYSTEMCTL = """#!/bin/sh
case $1 in
is-active) exit "$INACTIVE" ;;
is-enabled) exit "$DISABLED" ;;
show) [ "$*" = "show -P ExecMainStartTimestamp --timestamp=us+utc consul" ] && echo "$START" ;;
esac
"""


@pytest.fixture
def unit_state(tmp_path: Path) -> Callable[..., str]:
    (tmp_path / "systemctl").write_text(SYSTEMCTL)
    (tmp_path / "systemctl").chmod(0o755)

    def ask(*files: Path, inactive: int = 0, disabled: int = 0) -> str:
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "INACTIVE": str(inactive),
            "DISABLED": str(disabled),
            "START": START.strftime("%a %Y-%m-%d %H:%M:%S.%f UTC"),
        }
        fact = rolling.UnitState()
        command = ["sh", "-c", fact.command("consul", [str(file) for file in files])]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return fact.process(ran.stdout.splitlines())

    return ask


def written(path: Path, after_start_us: int) -> Path:
    """A file whose last write is so many microseconds after the service's start."""
    path.write_text("x")
    time = START_NS + after_start_us * 1000
    os.utime(path, ns=(time, time))
    return path


@pytest.mark.parametrize(("after_start_us", "state"), [(1, "stale"), (0, "fresh"), (-1, "fresh")])
def test_a_file_newer_than_the_process_is_stale_to_the_microsecond(
    tmp_path: Path, unit_state: Callable[..., str], after_start_us: int, state: str
) -> None:
    old = written(tmp_path / "old", -(10**6))
    assert unit_state(old, written(tmp_path / "it's new", after_start_us)) == state


@pytest.mark.parametrize(
    ("inactive", "disabled", "state"),
    [(3, 0, "stopped"), (3, 1, "stopped"), (0, 1, "stale")],
)
def test_a_unit_that_is_stopped_or_not_enabled(
    tmp_path: Path, unit_state: Callable[..., str], inactive: int, disabled: int, state: str
) -> None:
    assert unit_state(written(tmp_path / "a", -1), inactive=inactive, disabled=disabled) == state


def test_a_link_that_was_swapped_counts_not_the_age_of_its_target(
    tmp_path: Path, unit_state: Callable[..., str]
) -> None:
    old, new = written(tmp_path / "1.0.0", -5), written(tmp_path / "2.0.0", -5)
    link = tmp_path / "consul"
    link.symlink_to(old)
    os.utime(link, ns=(START_NS - 1000, START_NS - 1000), follow_symlinks=False)
    assert unit_state(link) == "fresh"
    (tmp_path / "next").symlink_to(new)
    os.utime(tmp_path / "next", ns=(START_NS + 1000, START_NS + 1000), follow_symlinks=False)
    (tmp_path / "next").rename(link)
    assert unit_state(link) == "stale"


def test_a_file_that_is_not_there_makes_nothing_stale(tmp_path: Path, unit_state: Callable[..., str]) -> None:
    assert unit_state(tmp_path / "none") == "fresh"


@pytest.mark.parametrize("holder", ["proxy-01", "proxy-02"])
def test_the_proxy_that_holds_the_address_goes_last(pyinfra: Pyinfra, holder: str) -> None:
    stale = {"proxy-01": "stale", "proxy-02": "stale"}
    run = pyinfra("roll.py", state=stale, group="proxies", vip="192.168.56.20", holder=holder)
    other = next(proxy for proxy in stale if proxy != holder)
    assert (run.code, run.done("restart")) == (0, [other, holder])


def test_it_is_not_touched_when_the_other_one_does_not_recover(pyinfra: Pyinfra) -> None:
    run = pyinfra(
        "roll.py",
        *("--data", "roll_deadline_s=0"),
        state={"proxy-01": "stale", "proxy-02": "stale"},
        group="proxies",
        vip="192.168.56.20",
        holder="proxy-01",
        lost=["proxy-02"],
    )
    assert (run.code, run.done("restart")) == (1, ["proxy-02"])
