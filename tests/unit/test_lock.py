"""One run at a time, against a Consul that keeps sessions, locks and their delays by a clock of its own."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from consul.base import NotFound

from tasks import lock
from tests.unit.conftest import Run


class Clock:
    now = 1000.0
    at_each_step: Callable[[], None] = staticmethod(lambda: None)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.at_each_step()


class Consul:
    """Sessions end 2 x TTL after their last renewal; what they held stays closed for the lock-delay."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.renewed: dict[str, float] = {}
        self.value, self.owner, self.closed_until = "", "", 0.0
        self.made = 0
        self.session = SimpleNamespace(create=self.create, renew=self.renew, destroy=self.destroy)
        self.kv = SimpleNamespace(put=self.put, get=self.get)

    def ask(self, step: Callable[[Any], Any]) -> Any:  # noqa: ANN401
        for session, seen in list(self.renewed.items()):
            if self.clock.now - seen > 2 * lock.TTL_S:
                self.destroy(session)
        return step(self)

    def create(self, name: str, checks: list[str], lock_delay: int, ttl: int) -> str:
        assert (checks, lock_delay, ttl) == ([], lock.DELAY_S, lock.TTL_S)
        self.made += 1
        self.renewed[f"session-{self.made}"] = self.clock.now
        return f"session-{self.made}"

    def renew(self, session: str) -> None:
        if session not in self.renewed:
            raise NotFound(session)
        self.renewed[session] = self.clock.now

    def destroy(self, session: str) -> None:
        self.renewed.pop(session, None)
        if self.owner == session:
            self.owner, self.closed_until = "", self.clock.now + lock.DELAY_S

    def put(self, key: str, value: str, acquire: str = "", release: str = "") -> bool:
        assert key == lock.KEY
        if release:
            self.owner, self.value = "", value
            return True
        free = not self.owner and self.clock.now >= self.closed_until
        if acquire not in self.renewed or not (free or self.owner == acquire):
            return False
        self.owner, self.value = acquire, value
        return True

    def get(self, key: str) -> tuple[str, dict[str, Any]]:
        session = {"Session": self.owner} if self.owner else {}
        return "1", {"Value": self.value.encode() or None, **session}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lock, "time", clock)
    monkeypatch.setattr(lock, "gevent", SimpleNamespace(spawn=lambda keep: None, sleep=clock.sleep))
    return clock


@pytest.fixture
def consul(clock: Clock) -> Consul:
    return Consul(clock)


def take(consul: Consul, what: str = "release 0.0.3", say: Callable[[str], Any] = str) -> lock.Lock:
    return lock.take(consul.ask, what, say)


def test_the_free_lock_is_taken_at_once_and_says_who_has_it(consul: Consul, clock: Clock) -> None:
    take(consul)
    assert clock.now == 1000
    found = consul.ask(lock.look)
    assert found.session and found.holder.what == "release 0.0.3" and found.holder.who == lock.who()


def test_what_is_given_back_is_free_without_a_delay(consul: Consul, clock: Clock) -> None:
    take(consul).give_back()
    assert consul.ask(lock.look) == lock.Found()
    take(consul)
    assert clock.now == 1000


def test_a_live_holder_is_named_within_two_beats_and_keeps_the_lock(consul: Consul, clock: Clock) -> None:
    mine = take(consul)
    beats = iter(range(1004, 2000, lock.BEAT_S))
    due = [next(beats)]

    def at_each_step() -> None:
        if clock.now >= due[0]:
            due[0] = next(beats)
            assert consul.ask(lambda api: mine.beat())

    clock.at_each_step = at_each_step  # type: ignore[method-assign]
    with pytest.raises(lock.Held, match=r"since \S+Z for: release 0.0.3; wait until that has ended"):
        take(consul, "rollback to 0.0.2")
    assert clock.now - 1000 <= 2 * lock.BEAT_S
    assert (consul.owner, list(consul.renewed)) == (mine.session, [mine.session])


def test_a_crashed_holder_is_waited_for_and_that_is_said(consul: Consul, clock: Clock) -> None:
    take(consul)
    said: list[str] = []
    mine = take(consul, "release 0.0.4", said.append)
    assert consul.owner == mine.session
    waited = clock.now - 1000
    assert 2 * lock.TTL_S + lock.DELAY_S <= waited <= lock.LONGEST_WAIT_S + lock.BEAT_S
    assert "looking for a sign of life" in said[0]
    assert all("no sign of life" in line for line in said[1:]) and len(said) >= waited // 5


@pytest.mark.parametrize("silent_s", [2 * lock.TTL_S - lock.BEAT_S, 2 * lock.TTL_S + 2 * lock.BEAT_S])
def test_a_silent_consul_is_the_loss_of_the_lock_only_after_its_session_may_have_ended(
    consul: Consul, clock: Clock, silent_s: int
) -> None:
    mine = take(consul)

    def ask(step: Callable[[Any], Any]) -> Any:  # noqa: ANN401
        if clock.now >= 1000 + silent_s:
            mine.ended = True
        raise requests.ConnectionError("refused")

    mine.ask = ask
    mine.keep()
    assert (mine.lost is not None) == (silent_s > 2 * lock.TTL_S)


def test_a_silence_that_left_the_session_alive_heals(consul: Consul, clock: Clock) -> None:
    mine = take(consul)
    lost: list[str | None] = []

    def ask(step: Callable[[Any], Any]) -> Any:  # noqa: ANN401
        if clock.now < 1040:
            raise requests.ConnectionError("refused")
        lost.append(mine.lost)
        mine.ended = len(lost) > 1
        return step(consul)  # no session has ended: a Consul without a leader ends none

    mine.ask = ask
    mine.keep()
    assert lost[0] is not None and lost[1] is None


def test_a_session_that_was_ended_is_the_loss_of_the_lock(consul: Consul, clock: Clock) -> None:
    mine = take(consul)
    consul.destroy(mine.session)
    mine.keep()
    assert mine.lost == "Consul has ended this run's session"


def test_before_a_step_consul_is_asked_anew(consul: Consul, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_mine", None)
    assert lock.fault() is None
    mine = take(consul)
    monkeypatch.setattr(lock, "_mine", mine)
    assert lock.fault() is None
    consul.destroy(mine.session)
    gone = "the lock was lost: Consul has ended this run's session; run the same again to go on"
    assert lock.fault() == gone


# Through pyinfra's real engine: the lock around one operation (fake/locked.py).

Pyinfra = Callable[..., Run]


def test_holding_the_lock_is_no_change_and_it_is_given_back_once(pyinfra: Pyinfra) -> None:
    run = pyinfra("locked.py", state={})
    assert (run.code, list(run.changed())) == (0, ["Go ahead", "Go on"])
    events = [line.split(" ")[0] for line in run.journal]
    assert events == ["taken", *["shell"] * (3 + 4), "given"]


def test_a_held_lock_is_one_line_and_nothing_is_changed(pyinfra: Pyinfra) -> None:
    run = pyinfra("locked.py", state={}, **{"held by": "ann@laptop since 01:00 for: release 0.0.3"})
    assert (run.code, run.journal) == (1, [])
    lines = [line for line in run.stderr.splitlines() if "ann@laptop" in line]
    assert len(lines) == 1 and lines[0].endswith("release 0.0.3. Nothing was changed.")
    assert "Traceback" not in run.stderr


def test_a_run_that_fails_gives_the_lock_back(pyinfra: Pyinfra) -> None:
    run = pyinfra("locked.py", state={}, **{"fails: go on": ["worker-02"]})
    assert run.code == 1
    assert [line.split(" ")[0] for line in run.journal].count("given") == 1


def test_looking_at_what_would_change_takes_no_lock(pyinfra: Pyinfra) -> None:
    run = pyinfra("locked.py", "--dry", state={})
    assert (run.code, run.journal) == (0, [])


@pytest.mark.parametrize(("needed", "code", "done"), [(True, 1, 0), (False, 0, 3 + 4)])
def test_only_a_deploy_goes_on_without_consul(pyinfra: Pyinfra, needed: bool, code: int, done: int) -> None:
    run = pyinfra("locked.py", state={}, silent=True, needed=needed)
    assert (run.code, len(run.done("shell"))) == (code, done)
    assert ("there is no lock; run deploy.py" in run.stderr) == needed
