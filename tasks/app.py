"""A version of the app: may it be released, and its roll-out by the scheduler that runs the app."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyinfra import host, logger
from pyinfra.api import DeployError, FunctionCommand, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State

from tasks import (
    app_secrets,
    cluster,
    containers,
    distribute,
    held,
    history,
    image,
    lock,
    nomad_job,
    preflight,
    rolling,
    serving,
)
from tasks import version as versions


def wanted_version() -> str:
    """The version of `--data version=...`."""
    version = host.data.get("version")
    fault = versions.fault(version)
    if fault:
        raise DeployError(fault)
    return str(version)


def check(version: str) -> None:
    """Refuse in one line, in prepare, what cannot end well. Reads only; call it on one worker."""
    for line in preflight.scheduler_change():
        raise DeployError(line)
    kept = held.by_all().get(version)
    if kept:  # no registry is needed, so none has to answer
        _check_source(version, kept.source)
    else:
        _check_registries(version)
    if host.data.scheduler == "nomad":
        nomad_job.check(version)


def _check_registries(version: str) -> None:
    for member in rolling.members("workers"):
        try:
            distribute.digest(member, version)
        except cluster.Unavailable as error:
            raise DeployError(
                f"{member.name}: its registry does not answer ({distribute.said(error)});"
                f" run deploy.py, or go on without: --exclude {member.name}"
            ) from None
    found = distribute.digests(version)
    fault = distribute.disagreement(found)
    if fault:
        raise DeployError(f"{version}: {fault}; delete the wrong one")
    if found:
        _check_source(version, distribute.source(next(iter(found)), version))
    else:
        _check_new(version)


def _check_new(version: str) -> None:
    if not (Path(host.data.app_folder) / "Dockerfile").is_file():
        raise DeployError(f"app_folder={host.data.app_folder}: no Dockerfile there")
    with _consul_answers():
        served = history.served(lock.ask(history.entries))
    if version in served:
        raise DeployError(
            f"{version}: was in service before, and no registry of this run holds it any more;"
            " choose a new version"
        )


@contextmanager
def _consul_answers() -> Iterator[None]:
    try:
        yield
    except cluster.Unavailable as error:
        reason = distribute.said(error)
        raise DeployError(f"{host.name}: Consul does not answer ({reason}); run deploy.py") from None


def _check_source(version: str, built_from: str) -> None:
    """A version is built once. Its image is used again, but never passed off as newer source."""
    if image.source_hash(Path(host.data.app_folder)) == built_from:
        return
    with _consul_answers():
        running = version in serving.running_versions()
    if running:
        raise DeployError(
            f"{version}: runs already and {host.data.app_folder}/ has changed since it was built;"
            " choose a new version"
        )
    logger.warning(f"{version}: released before from other source; its existing image is used")


def check_hardening() -> None:
    """In prepare: what is wrong with its user or its secrets is said before anything is done."""
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", str(host.data.app_user)):
        raise DeployError(f"app_user={host.data.app_user}: give numbers, and not root's, as in 10001:10001")
    app_secrets.stamp(host.data)


def put_into_service(version: str) -> None:
    """For release.py and rollback.py, once every worker holds the image."""
    check_hardening()
    if "workers" in host.groups:
        roll(name=f"Replace what runs by {version}", version=version)
    if "proxies" in host.groups:
        rolling.wait_until_healthy(
            name=f"Check that exactly {version} serves",
            what=version,
            fault=serving.exactly(version),
        )
    history.end(name="Note that it is in service")


def finish(version: str) -> None:
    """The end of release.py and rollback.py."""
    lock.give_back(name="Let the next run begin")
    if "workers" in host.groups:
        see_it_answers(name="Check that each worker still answers", version=version)


@operation()
def roll(version: str) -> Generator[FunctionCommand]:
    """Replace what runs by `version`, health-gated; what served before serves on if that fails.

    Called on each worker and done by the first one left, so the loss of one does not end it.
    """
    if not rolling.leads("workers"):
        host.noop("another worker leads")
    elif settled(version):
        logger.info(f"{host.print_prefix}{version} runs as it should: nothing to do")
        host.noop(f"{version} runs")
    else:
        yield FunctionCommand(_roll, (version,), {})


def settled(version: str) -> bool:
    """`version` serves as it should already."""
    if host.data.scheduler == "nomad":
        return nomad_job.settled(version)
    try:
        return not _outdated(version)[1]
    except _FAULTS:
        return False  # what is wrong is said when the release itself meets it


def _outdated(version: str) -> tuple[containers.Release, list[Host]]:
    """Docker scheduler: what every worker shall run, and the workers that do not."""
    release = containers.Release(version, distribute.digest_of(version))
    return release, containers.outdated(rolling.members("workers"), release)


_FAULTS = (containers.Failed, containers.Lost, *cluster.Unavailable)


def _roll(state: State, host: Host, version: str) -> bool:
    def say(line: str) -> None:
        logger.info(f"{host.print_prefix}{version}: {line}")

    try:
        fault = lock.fault() or _release(version, say)
    except _FAULTS as error:
        fault = f"{distribute.said(error)}; run the same again to go on"
    if fault:
        history.failed(fault)
        logger.error(f"{host.print_prefix}{version}: {fault}")
    return not fault


def _release(version: str, say: Callable[[str], None]) -> str | None:
    if host.data.scheduler == "nomad":
        return nomad_job.release(version, say)
    release, workers = _outdated(version)
    if not release.digest:
        return "neither a registry nor every worker's Docker holds it"
    return containers.roll(workers, release, lock.fault).fault


@operation()
def see_it_answers(version: str) -> Generator[FunctionCommand]:
    """The last step: a worker that was lost on the way makes the run's exit code 1."""
    if distribute.run(host, "true") is None:
        host.noop("it answers")
        return
    yield FunctionCommand(_lost, (version,), {})


def _lost(state: State, host: Host, version: str) -> bool:
    logger.error(
        f"{host.print_prefix}lost on the way; {version} serves from the others. Repair it and release again"
    )
    return False
