"""Restart what runs with old configuration: at once where that is safe, else one host at a time.

What is on disk decides, not what this run wrote: a unit is stale when one of its files is newer than
its main process. So a run that was interrupted between writing and restarting is finished by the next.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field

from pyinfra import host, logger, state
from pyinfra.api import FactBase, FunctionCommand, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State

from tasks import cluster, lock, shell, vip

PROCESS_START = "ExecMainStartTimestamp"


class UnitState(FactBase[str]):
    """ "stopped", "stale" (a file is newer than the main process, or not enabled), "unread" or "fresh".

    since: systemd's name for the moment at which the unit has read its files. reload: files that it reads
    again on a reload; "unread" if one is newer than the start and than our last reload.
    """

    def command(
        self, unit: str, files: Iterable[str], since: str = PROCESS_START, reload: Iterable[str] = ()
    ) -> str:
        newer = f'-newermt "$start" {_newer_than(reloaded(unit))} -print -quit'
        unread = f'[ -n "$(find {shlex.join(reload)} {newer})" ]' if reload else "false"
        return (
            f"if ! systemctl is-active -q {unit}; then echo stopped;"
            f" elif ! systemctl is-enabled -q {unit}; then echo stale; else"
            f" start=$(systemctl show -P {since} --timestamp=us+utc {unit});"
            f' if [ -n "$(find {shlex.join(files)} -newermt "$start" -print -quit)" ]; then echo stale;'
            f" elif {unread}; then echo unread; else echo fresh; fi; fi"
        )

    def process(self, output: Iterable[str]) -> str:
        return "".join(output).strip() or "stopped"


def _newer_than(file: str) -> str:
    """A condition for find, if there is such a file to compare with."""
    return f"$(test ! -e {file} || echo -newer {file})"


def reloaded(unit: str) -> str:
    """A file as old as our last reload of the unit; gone after a boot, which starts the unit anew."""
    return f"/run/{unit}.reloaded"


def reload_command(unit: str) -> str:
    """The time is taken before: what is written meanwhile is read once more the next time."""
    done = reloaded(unit)
    return f"touch {done}.new && systemctl reload {unit} && mv {done}.new {done}"


class NeverOpens(Exception):
    """A gate for which waiting is of no use: why, in a few words."""


def restart_command(unit: str) -> str:
    """The reload comes first: the unit's own file may be among what changed."""
    return f"systemctl daemon-reload && systemctl enable -q {unit} && systemctl restart {unit}"


@operation()
def restart_if_stale(unit: str, files: list[str], since: str = PROCESS_START) -> Generator[str]:
    """Start and enable `unit`, or restart it when one of `files` is newer than its start (see UnitState)."""
    if host.get_fact(UnitState, unit=unit, files=files, since=since) == "fresh":
        host.noop(f"{unit} runs with its current files")
        return
    yield restart_command(unit)


@operation()
def start_if_stopped(unit: str, files: list[str], reload: list[str] | None = None) -> Generator[str]:
    """Start and enable `unit` if it does not run; never restart it.

    Reload it for a newer one of the files `reload`, unless it is to be restarted anyway.
    """
    now = host.get_fact(UnitState, unit=unit, files=files, reload=reload or [])
    if now == "stopped":
        yield restart_command(unit)
    elif now == "unread":
        yield reload_command(unit)
    else:
        host.noop(f"{unit} runs")


@dataclass(frozen=True)
class Service:
    """A service that runs on many hosts and must not lose more than one of them at a time.

    Every answer that is a string or None is what is wrong in a few words, or None when all is well.
    """

    unit: str
    files: list[str]
    rank: Callable[[Host], int]  # lowest first: the sick (0), then the healthy (1), then the leader
    gate: Callable[[Host], str | None]  # asked before a healthy one is stopped; may raise NeverOpens
    recovery: Callable[[Host], Callable[[], str | None]]  # called before the stop, asked after it
    group: str = ""  # "" = every host
    since: str = PROCESS_START  # see UnitState
    restart: Callable[[Host, str], str | None] = field(default=lambda member, unit: run(member, unit))


def run(member: Host, unit: str) -> str | None:
    """Restart `unit` on `member`, whichever host this is called for."""
    ok, output = shell.run(member, restart_command(unit))
    return None if ok else f"systemctl restart {unit}: {(output.stderr_lines or ['failed'])[0]}"


def driver() -> bool:
    """True on one host of this run: what acts on the whole cluster happens there, once."""
    return host.name == min(member.name for member in state.active_hosts)


def leads(group: str) -> bool:
    """True for one host of the group: the first by name in this run. See driver."""
    return [host.name] == [member.name for member in members(group)[:1]]


def leaves_it_to_another() -> bool:
    """True, and noted, on all hosts but the driver. For an operation that one host carries out, and that
    every host calls: what comes after it on another host would not wait for it, nor it for what was before.
    """
    if not driver():
        host.noop("another host does it")
    return not driver()


def members(group: str) -> list[Host]:
    """The hosts of a group ("" = all) that take part in this run, by name."""
    hosts = [h for h in state.active_hosts if not group or group in h.groups]
    return sorted(hosts, key=lambda h: h.name)


@operation()
def roll(service: Service) -> Generator[FunctionCommand]:
    """Restart the stale hosts of a service one by one, the sick first and the leader last.

    Runs on one host (see `driver`) for all hosts of this run. Before a healthy one is stopped the
    gate must open; the next one waits until this one has recovered. The first fault ends the run.
    Of equals, the proxy that holds the VIP goes last.
    """
    stale = [h for h in members(service.group) if _stale(h, service)]
    if not stale:
        host.noop(f"every {service.unit} runs with its current files")
        return
    yield FunctionCommand(restart_each, (service, stale), {})


def _stale(member: Host, service: Service) -> bool:
    return member.get_fact(UnitState, unit=service.unit, files=service.files, since=service.since) == "stale"


def restart_each(state: State, host: Host, service: Service, which: list[Host]) -> bool:
    """One by one, gated, the leader last; False once one has not recovered, with one line that says why."""
    waiting = list(which)
    while waiting:
        member = min(waiting, key=lambda m: _rank(service, m))  # asked anew: a restart may move the leader
        waiting.remove(member)
        try:
            fault = lock.fault() or _restart(service, member)
        except cluster.Unavailable as error:
            fault = f"no answer ({error or type(error).__name__})"
        if fault:
            logger.error(f"{member.print_prefix}{service.unit}: {fault}. No further host is touched.")
            return False
    return True


def _rank(service: Service, member: Host) -> tuple[int, bool]:
    """Order only: whether it may be stopped is the gate's to say."""
    try:
        return service.rank(member), vip.holds(member)
    except cluster.Unavailable:
        return 0, False


def _restart(service: Service, member: Host) -> str | None:
    def say(line: str) -> None:
        logger.info(f"{member.print_prefix}{line}")

    deadline_s = float(member.data.roll_deadline_s)
    unit = service.unit
    try:
        closed = cluster.wait_until("a safe moment", lambda: service.gate(member), deadline_s, say)
    except NeverOpens as why:
        closed = str(why)
    if closed:
        return f"not restarted, {closed}; repair that first or add --data accept_outage=true"
    recovered = service.recovery(member)
    say(f"restarting {unit}")
    fault = service.restart(member, unit) or cluster.wait_until(
        f"{unit} to recover", recovered, deadline_s, say
    )
    return fault and f"{fault}; see journalctl -u {unit} there"


@operation()
def change_by_api(
    differs: Callable[[], str | None], change: Callable[[], object]
) -> Generator[FunctionCommand]:
    """Call `change` where `differs` says how the cluster is not as it should be, or does not answer yet."""
    if cluster.wait_until("", differs, 0) is None:
        host.noop("as it should be")
        return
    yield FunctionCommand(_change, (change,), {})


def _change(state: State, host: Host, change: Callable[[], object]) -> bool:
    try:
        change()
    except cluster.Unavailable as error:
        logger.error(f"{host.print_prefix}{error or type(error).__name__}; run deploy.py again")
        return False
    return True


@operation()
def wait_until_healthy(what: str, fault: Callable[[], str | None]) -> Generator[FunctionCommand]:
    """Wait until `fault` answers None; no change when it does so at once."""
    if cluster.wait_until(what, fault, 0) is None:
        host.noop(f"{what}: healthy")
        return
    yield FunctionCommand(_wait, (what, fault), {})


def _wait(state: State, host: Host, what: str, fault: Callable[[], str | None]) -> bool:
    deadline_s = float(host.data.roll_deadline_s)
    wrong = cluster.wait_until(what, fault, deadline_s, logger.info)
    if wrong:
        logger.error(f"{host.print_prefix}{what}: {wrong}, after {deadline_s:.0f} s; see journalctl there")
    return wrong is None
