"""Old versions go after a release, from the registries and from Docker; none that may be needed does."""

from __future__ import annotations

from collections.abc import Generator
from itertools import chain

import gevent  # type: ignore[import-untyped]
from pyinfra import host, logger
from pyinfra.api import DeployError, FunctionCommand, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State

from tasks import (
    artifact,
    cluster,
    containers,
    distribute,
    history,
    lock,
    registry,
    rollback,
    rolling,
    serving,
)

Found = dict[str, set[str]]  # version -> its digests in the registries: one, unless a build was cut off


def check() -> None:
    """Refuse, in prepare, a number that would take the way back."""
    keep = host.data.registry_keep_versions
    if not isinstance(keep, int) or keep < 2:
        raise DeployError(
            f"registry_keep_versions={keep}: choose a number from 2 on: what runs, and the version before"
        )


def surplus(found: Found, served: list[str], running: set[str], keep: int) -> Found:
    """What to delete. served: what was in service, the last one first.

    The versions that run and the last `keep` stay: what was in service counts first, then the highest
    numbers. So does an image that one of them shares.
    """
    others = sorted(found.keys() - set(served), key=artifact.order, reverse=True)
    held = [version for version in [*served, *others] if version in found]
    gone = [version for version in held[keep:] if version not in running]
    needed = set(chain.from_iterable(found[version] for version in found.keys() - set(gone)))
    return {version: found[version] - needed for version in gone}


def strays(found: Found, kept: list[history.Entry]) -> list[str]:
    """Digests of a version that was in service with another one, which some registry holds: left by a
    builder that was lost after its build."""
    right = {entry.version: entry.digest for entry in kept if entry.result == history.IN_SERVICE}
    wrong = [digests - {right[v]} for v, digests in found.items() if right.get(v) in digests]
    return sorted(chain.from_iterable(wrong))


@operation()
def prune() -> Generator[FunctionCommand]:
    """Delete what is not needed any more. Called on each worker, and done by the first for all.

    The lock must be held: no build may push while a registry looks which layers are still used. What
    fails is only said, since the release itself is done.
    """
    if not rolling.leads("workers"):
        host.noop("another worker leads")
        return
    digests = _unneeded()
    if not digests or lock.fault():
        host.noop("nothing to delete")
        return
    yield FunctionCommand(_prune, (digests,), {})


def _unneeded() -> list[str]:
    """Nothing where it cannot be told for sure."""
    try:
        kept = lock.ask(history.entries)
        served, running = rollback.served(kept), serving.running_versions()
        found = _found()
    except (*cluster.Unavailable, containers.Failed, containers.Lost) as error:
        logger.warning(f"{host.print_prefix}no old version is deleted: {distribute.said(error)}")
        return []
    old = surplus(found, served, running, host.data.registry_keep_versions)
    if old:
        logger.info(f"{host.print_prefix}deleting {', '.join(old)}")
    return sorted({*chain.from_iterable(old.values()), *strays(found, kept)})


def _found() -> Found:
    found: Found = {}
    for member in rolling.members("workers"):
        for version, digest in distribute.catalogue(member).items():
            found.setdefault(version, set()).add(digest)
    return found


def _prune(state: State, host: Host, digests: list[str]) -> bool:
    command = f"{registry.SYNC} prune {' '.join(digests)}"
    members = rolling.members("workers")
    jobs = [gevent.spawn(distribute.run, member, command) for member in members]
    gevent.joinall(jobs, raise_error=True)
    for member, job in zip(members, jobs, strict=True):
        if job.value:
            logger.warning(f"{member.print_prefix}old images are not deleted: {job.value}")
    return True
