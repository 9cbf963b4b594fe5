"""The audit trail: the last releases and rollbacks, in Consul, under one key, the newest last."""

from __future__ import annotations

import atexit
import json
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from typing import Any

from consul import Consul
from pyinfra import host, logger, state
from pyinfra.api import operation

from tasks import lock, rolling
from tasks.cluster import Unavailable

KEY = "hashistack/release/history"
KEEP = 50  # entries; Consul takes half a megabyte under one key, an entry has 0.3 kB

UNDER_WAY = "under way"
CUT_OFF = "cut off"
IN_SERVICE = "in service"


@dataclass(frozen=True)
class Entry:
    """One run. when: its start, UTC. digest: sha256:..., "" while the image is not built."""

    who: str
    when: str
    action: str  # release or rollback
    version: str
    digest: str = ""
    result: str = UNDER_WAY  # or in service, or what went wrong
    seconds: int = 0


def entries(api: Consul) -> list[Entry]:
    """All that are kept, the newest last."""
    return _read(api)[0]


def _read(api: Consul) -> tuple[list[Entry], int]:
    found = api.kv.get(KEY)[1]
    if not found:
        return [], 0
    return [Entry(**item) for item in json.loads(found["Value"])], found["ModifyIndex"]


def write(api: Consul, entry: Entry) -> None:
    """Add the entry, or replace that of the same run."""
    written = False
    while not written:
        kept, index = _read(api)
        value = json.dumps([asdict(item) for item in merge(kept, entry)])
        written = api.kv.put(KEY, value, cas=index)


def merge(kept: list[Entry], entry: Entry) -> list[Entry]:
    """The entry in its place or at the end, and no more than KEEP in all. Clocks may differ: none sorts.

    Whoever writes has the lock, so no other run is under way.
    """
    kept = [replace(item, result=CUT_OFF) if item.result == UNDER_WAY else item for item in kept]
    same = [(item.who, item.when) == (entry.who, entry.when) for item in kept]
    merged = [entry if is_it else item for item, is_it in zip(kept, same, strict=True)]
    return (merged if any(same) else [*kept, entry])[-KEEP:]


def served(kept: list[Entry]) -> list[str]:
    """The versions that were put into service, the last one first."""
    return list(dict.fromkeys(item.version for item in reversed(kept) if item.result == IN_SERVICE))


# pyinfra's side: the entry of this run

_entry: Entry | None = None
_start = 0.0
_digest_of: Callable[[str], str] = str


@operation()
def begin(
    action: str, version: str, settled: Callable[[str], bool], digest_of: Callable[[str], str]
) -> Generator[str]:
    """Note that this run has begun, unless `version` is in service already. Never counts as a change.

    Called on every host, like lock.hold, and done by one.
    """
    if state.is_executing and rolling.driver():
        try:
            host.noop(_begin(action, version, settled, digest_of))
        except Unavailable as error:
            logger.warning(f"{host.print_prefix}not in the audit trail: {error or type(error).__name__}")
    yield from ()


def _begin(action: str, version: str, settled: Callable[[str], bool], digest_of: Callable[[str], str]) -> str:
    global _entry, _start, _digest_of
    last = lock.ask(entries)[-1:]
    if [(item.version, item.result) for item in last] == [(version, IN_SERVICE)] and settled(version):
        return f"{version} is in service already"
    _start, _digest_of = time.monotonic(), digest_of
    entry = _entry = Entry(lock.who(), lock.now(), action, version, digest_of(version))
    lock.ask(lambda api: write(api, entry))
    atexit.register(_end, "failed or interrupted: see its output")
    return "noted"


def failed(fault: str) -> None:
    """Why this run is about to fail: its entry says so in the end."""
    _end(f"failed: {fault.splitlines()[0]}")


@operation()
def end() -> Generator[str]:
    """Note that the version is in service: on each host, done by the first."""
    if state.is_executing:
        _end(IN_SERVICE)
        host.noop("noted")
    yield from ()


def _end(result: str) -> None:
    global _entry
    entry, _entry = _entry, None
    if entry is None:
        return
    try:
        done: dict[str, Any] = {"result": result, "seconds": round(time.monotonic() - _start)}
        digest = _digest_of(entry.version) or entry.digest
        lock.ask(lambda api: write(api, replace(entry, digest=digest, **done)))
    except Unavailable as error:
        logger.warning(f"the audit trail lacks how {entry.version} ended: {error or type(error).__name__}")
