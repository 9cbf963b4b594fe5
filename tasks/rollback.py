"""Which version to go back to: one that served before, and that every worker still holds in Docker."""

from __future__ import annotations

from pyinfra import host
from pyinfra.api import DeployError

from tasks import cluster, containers, distribute, held, history, lock, nomad_job, rolling, serving
from tasks import version as versions


def wanted_version() -> str:
    """The version of `--data to=...`, by default the one before. Reads only; refuses in one line."""
    to = host.data.get("to")
    wrong = versions.fault(to, "to") if to is not None else None
    if wrong:
        raise DeployError(wrong)
    try:
        kept = lock.ask(history.entries)
        running = serving.running_versions()
        before = served(kept)
    except (*cluster.Unavailable, containers.Failed, containers.Lost) as error:
        raise DeployError(f"{host.name}: {distribute.said(error)}; run deploy.py") from None
    version, fault = choose(to, current(running, kept), before, held.survey())
    if fault:
        raise DeployError(fault)
    return version


def served(kept: list[history.Entry]) -> list[str]:
    """The versions that were in service, the last one first: from the audit trail, then from what the
    scheduler remembers, should the trail have been lost."""
    if host.data.scheduler == "nomad":
        remembered = nomad_job.stable_versions()
    else:
        found = [i for worker in rolling.members("workers") for i in containers.instances(worker)]
        remembered = [i.version for i in sorted(found, key=lambda i: i.created, reverse=True)]
    return list(dict.fromkeys([*history.served(kept), *remembered]))


def current(running: set[str], kept: list[history.Entry]) -> str:
    """The version to get away from; "" if none runs. Of two, that of the run that was interrupted."""
    newest = kept[-1].version if kept else ""
    return newest if newest in running else max(running, default="")


def choose(
    to: str | None, now: str, before: list[str], found: dict[str, held.Images]
) -> tuple[str, str | None]:
    """The version to go back to, and what is wrong with that. before: the last one first."""
    everywhere = held.everywhere(list(found.values()))
    possible = [version for version in before if version in everywhere]
    listed = f"every worker holds: {', '.join(possible) or 'none'}"
    if to is None:
        to = next((version for version in possible if version != now), None)
        return to or "", None if to else f"no version before {now or 'the first'} is left; {listed}"
    if to not in before:
        return to, f"to={to}: was never in service; {listed}"
    lacking = [worker for worker, images in found.items() if to not in images]
    if lacking:
        return to, f"to={to}: {', '.join(lacking)} no longer holds it; {listed}"
    if to not in everywhere:
        return to, f"to={to}: the workers hold different images of it; {listed}"
    return to, None
