"""One release, rollback or deploy at a time: a lock in Consul, held by a session that dies with its holder.

A holder gives a sign of life every BEAT_S. Who finds the lock held looks for one: a live holder is named
and the new run refused, a dead one is waited for. Consul ends a session 2 x TTL_S after its last renewal
and keeps the lock closed for DELAY_S more, in which what the dead run had begun can come to its end.
"""

from __future__ import annotations

import atexit
import getpass
import json
import socket
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import gevent  # type: ignore[import-untyped]
from consul import Consul
from consul.base import NotFound
from pyinfra import host, logger, state
from pyinfra.api import FunctionCommand, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State

from tasks.cluster import Unavailable, consul_api

KEY = "hashistack/release/lock"
TTL_S = 15
DELAY_S = 15
BEAT_S = 3
LONGEST_WAIT_S = 2 * TTL_S + DELAY_S

Answer = TypeVar("Answer")
Ask = Callable[[Callable[[Consul], Any]], Any]  # calls the function with the API of an agent that answers
Say = Callable[[str], Any]


def who() -> str:
    """The person and machine that this run belongs to."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def now() -> str:
    """UTC, to the second, as ISO 8601 has it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Holder:
    """Who holds the lock, since when (UTC) and for what. beat: counts the signs of life."""

    who: str
    since: str
    what: str
    beat: int = 0

    def __str__(self) -> str:
        return f"{self.who} since {self.since} for: {self.what}"


class Held(Exception):
    """One line: somebody else has the lock."""


@dataclass(frozen=True)
class Found:
    """What stands in Consul. session "" with a holder: that run crashed, or has lost its session."""

    session: str = ""
    holder: Holder | None = None


def look(api: Consul) -> Found:
    """Who has the lock."""
    entry = api.kv.get(KEY)[1] or {}
    value = entry.get("Value")
    return Found(entry.get("Session", ""), Holder(**json.loads(value)) if value else None)


class Lock:
    """Held from `take` to `give_back`. lost: why this run may no longer count on it, or None."""

    def __init__(self, ask: Ask, session: str, holder: Holder) -> None:
        self.ask, self.session, self.holder = ask, session, holder
        self.lost: str | None = None
        self.ended = False
        self.seen = time.monotonic()  # the last answer of Consul

    def beat(self) -> bool:
        """Renew the session and take or keep the lock; False while another run has it."""
        self.holder = replace(self.holder, beat=self.holder.beat + 1)
        value = json.dumps(asdict(self.holder))

        def step(api: Consul) -> bool:
            api.session.renew(self.session)
            return bool(api.kv.put(KEY, value, acquire=self.session))

        return bool(self.ask(step))

    def keep(self) -> None:
        """Give signs of life until the end, or until the session is gone."""
        while not self.ended and self.check():
            gevent.sleep(BEAT_S)

    def check(self) -> bool:
        """One sign of life; sets `lost`. False once the session is gone for good.

        A silent Consul may still have the lock for us: that is a loss only for as long as it lasts.
        """
        try:
            gone = not self.ended and not self.beat()
        except NotFound:
            gone = True
        except Unavailable as error:
            if time.monotonic() - self.seen > 2 * TTL_S:
                self.lost = f"Consul has not answered for {2 * TTL_S} s ({error or type(error).__name__})"
            return True
        self.seen, self.lost = time.monotonic(), "Consul has ended this run's session" if gone else None
        return not gone

    def give_back(self) -> None:
        """Released first: destroying a session that holds a lock would start the lock-delay."""
        self.ended = True

        def step(api: Consul) -> None:
            api.kv.put(KEY, "", release=self.session)
            api.session.destroy(self.session)

        self.ask(step)


def take(ask: Ask, what: str, say: Say) -> Lock:
    """Take the lock for `what`, and keep it. Raises Held, and Unavailable if Consul does not answer."""
    options = {"name": KEY, "checks": [], "lock_delay": DELAY_S, "ttl": TTL_S}  # no check: see `_ask`
    session = ask(lambda api: api.session.create(**options))
    lock = Lock(ask, session, Holder(who(), now(), what))
    try:
        _wait(lock, say)
    except BaseException:
        with suppress(*Unavailable):
            ask(lambda api: api.session.destroy(session))
        raise
    gevent.spawn(lock.keep)
    return lock


def _wait(lock: Lock, say: Say) -> None:
    start, told, first = time.monotonic(), 0.0, Found()
    while not lock.beat():
        found = lock.ask(look)
        waited = time.monotonic() - start
        first = first if first.holder else found
        if found.session and found != first:  # it changed hands, or its holder gave a sign of life
            raise Held(f"{found.holder}; wait until that has ended")
        if waited > LONGEST_WAIT_S + BEAT_S:
            raise Held(
                f"{found.holder}, without a sign of life, yet not freed in {waited:.0f} s; run it again"
            )
        if found.holder and waited >= told:
            say(f"the lock is held by {found.holder}; {_hope(waited)}")
            told += 5
        time.sleep(0.5)


def _hope(waited_s: float) -> str:
    if waited_s < BEAT_S + 1:
        return "looking for a sign of life"
    return f"no sign of life, waited {waited_s:.0f} of at most {LONGEST_WAIT_S} s for Consul to free it"


# pyinfra's side: one lock for this run

_mine: Lock | None = None


def fault() -> str | None:
    """Why this run must start nothing new, or None: Consul is asked. Without a lock there is none to lose."""
    if _mine and not _mine.lost:
        _mine.check()
    reason = _mine.lost if _mine else None
    return reason and f"the lock was lost: {reason}; run the same again to go on"


def ask(step: Callable[[Consul], Answer]) -> Answer:
    """`step` with the Consul agent of a host of this run, or of the next one where that is silent.

    Any agent will do, since the session carries no check of the node that it was made on.
    """
    error: Exception = OSError("no host takes part in this run")
    for member in sorted(state.activated_hosts, key=_trust):
        try:
            with consul_api(member) as api:
                return step(api)
        except Unavailable as silent:
            error = silent
    raise error


def _trust(member: Host) -> tuple[bool, bool, str]:
    """The servers that are well first. After a failure the failed ones are asked too."""
    return member not in state.active_hosts, "servers" not in member.groups, member.name


@operation()
def hold(what: str, needed: bool = True) -> Generator[FunctionCommand]:
    """Hold the lock from here on, until `give_back` or the end of the run.

    To be called on every host, though one asks for all: pyinfra would let the next operation of a host
    that does not call it go first. Acts by itself and yields nothing, so that it never counts as a
    change. Not `needed`: go on without where Consul does not answer, as on new hosts.
    """
    if not state.is_executing:
        return  # a look at what would change must not take it
    if host.name != min(member.name for member in state.active_hosts):
        host.noop("another host asks")
        return
    refused = _hold(what, needed)
    if refused:
        yield FunctionCommand(_refuse, (refused,), {})
    else:
        host.noop("no other run is under way")


def _hold(what: str, needed: bool) -> str | None:
    global _mine
    try:
        _mine = take(ask, what, lambda line: logger.info(f"{host.print_prefix}{line}"))
    except Held as held:
        return f"another run is under way: {held}. Nothing was changed."
    except Unavailable as error:
        silent = f"Consul does not answer ({error or type(error).__name__})"
        return f"{silent}, so there is no lock; run deploy.py. Nothing was changed." if needed else None
    atexit.register(_give_back)
    return None


def _refuse(state: State, host: Host, line: str) -> bool:
    logger.error(f"{host.print_prefix}{line}")
    return False


@operation()
def give_back() -> Generator[str]:
    """Give the lock back: on each host, done by the first, so that none is missed when one is lost."""
    if state.is_executing:
        _give_back()
        host.noop("the next run may begin")
    yield from ()


def _give_back() -> None:
    global _mine
    lock, _mine = _mine, None
    if lock is None:
        return
    try:
        lock.give_back()
    except Unavailable:
        logger.warning(f"Consul does not answer: the lock frees itself within {LONGEST_WAIT_S} s")
