"""An app image's way: built once on the builder, copied to each worker's registry, pulled by digest.

What the registries hold is the truth: a version is released when one of them has it, and its image is
never built again. Registries are read from the controller, through SSH.
"""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Generator, Iterable
from io import BytesIO
from pathlib import Path

import requests
from pyinfra import host, inventory, logger, state
from pyinfra.api import FactBase, FunctionCommand, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.facts.docker import DockerImage
from pyinfra.facts.server import Arch

from tasks import artifact, cluster, held, image, registry, registry_access, rolling, serving, shell

_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"
_LOST_S = 15


def notice_loss() -> None:
    """Make the connection to this host end soon after the host has vanished.

    TCP itself would wait for an answer for a quarter of an hour.
    """
    client = getattr(host.connector, "client", None)
    transport = client and client.get_transport()
    if transport and isinstance(transport.sock, socket.socket) and hasattr(socket, "TCP_USER_TIMEOUT"):
        transport.set_keepalive(_LOST_S // 3)
        transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _LOST_S * 1000)


# What the registries hold


def _get(member: Host, path: str, address: str = "127.0.0.1") -> requests.Response | None:
    """What the registry at `address`, seen from `member`, has at /v2/<app>/<path>; None for nothing.
    Else Unavailable."""
    with cluster.forward(member, member.data.registry_port, address) as port, cluster.http_session() as http:
        private = member.data.secure and address != "127.0.0.1"
        url = f"{'https' if private else 'http'}://127.0.0.1:{port}/v2/{member.data.app_name}/{path}"
        access = registry_access.request(member.data) if private else {}
        answer = http.get(url, headers={"Accept": _MANIFEST}, timeout=cluster.TIMEOUT_S, **access)
    if answer.status_code == 404:
        return None
    answer.raise_for_status()
    return answer


def digest(member: Host, version: str) -> str | None:
    """sha256:... of the image of `version` in the registry on `member`, or None."""
    answer = _get(member, f"manifests/{version}")
    return answer.headers["Docker-Content-Digest"] if answer else None


def held_at(address: str, digest: str, member: Host) -> bool:
    """Whether the registry of a worker outside this run answers and has it; `member` is who asks."""
    try:
        return _get(member, f"manifests/{digest}", address) is not None
    except cluster.Unavailable:
        return False


def catalogue(member: Host) -> dict[str, str]:
    """Version -> digest of what the registry on `member` holds, the highest number first."""
    tags = _get(member, "tags/list")
    versions = sorted((tags.json()["tags"] or []) if tags else [], key=artifact.order, reverse=True)
    with cluster.forward(member, member.data.registry_port) as port, cluster.http_session() as http:
        url = f"http://127.0.0.1:{port}/v2/{member.data.app_name}/manifests"
        answers = {
            version: http.head(f"{url}/{version}", headers={"Accept": _MANIFEST}, timeout=cluster.TIMEOUT_S)
            for version in versions
        }
    return {v: a.headers["Docker-Content-Digest"] for v, a in answers.items() if a.ok}


def source(member: Host, version: str) -> str:
    """The hash of the folder that the image was built from; "" if it does not say."""
    manifest = _get(member, f"manifests/{version}")
    config = manifest and _get(member, f"blobs/{manifest.json()['config']['digest']}")
    labels: dict[str, str] = config.json()["config"].get("Labels") or {} if config else {}
    return labels.get("hashistack.source", "")


def digests(version: str) -> dict[Host, str]:
    """The workers whose registry holds `version`, and its digest there; silent ones are left out."""
    found = {}
    for member in rolling.members("workers"):
        try:
            here = digest(member, version)
        except cluster.Unavailable:
            continue
        if here:
            found[member] = here
    return found


def digest_of(version: str) -> str:
    """From every worker's Docker, or where one lacks it from the registries; "" for neither.

    So the way back asks no registry: they may all be silent.
    """
    kept = held.by_all().get(version)
    return kept.digest if kept else next(iter(digests(version).values()), "")


def disagreement(found: dict[Host, str]) -> str | None:
    """Registries hold the same image of a version: anything else needs a person."""
    if len(set(found.values())) < 2:
        return None
    return "the registries hold different images of one version: " + ", ".join(
        f"{member.name} {digest[:19]}" for member, digest in found.items()
    )


def said(error: Exception) -> str:
    """An error in a few words: the server's own, or the system's, without those of the libraries."""
    answer = getattr(error, "nomad_resp", error)
    text = getattr(answer, "text", None) or str(answer) or type(error).__name__
    reason = re.search(r"\[Errno \d+\] ([\w ]+)|(Connection (?:aborted|reset)|timed out)", text)
    return (reason[1] or reason[2]).lower() if reason else " ".join(text.split())


# Build, copy, pull


def run(member: Host, command: str) -> str | None:
    """Run `command` on `member` as root; the last line of its errors if it fails."""
    try:
        return shell.fault(member, command)
    except (EOFError, *cluster.Unavailable) as error:
        return f"{member.name} does not answer ({said(error)})"


def builder() -> Host:
    """The worker that builds in this run: the builder, or the first of those that are there."""
    return (rolling.members("builder") or rolling.members("workers"))[0]


@operation()
def build(version: str) -> Generator[FunctionCommand]:
    """Build the image and push it to the builder's registry, unless `version` was released.

    Called on each worker; of a builder that is not in this run, or lost, another one takes the place.
    """
    if host.name != builder().name:
        host.noop(f"{builder().name} builds")
    elif digest_of(version):
        host.noop(f"{version} was released before: its image is used")
    else:
        yield FunctionCommand(_build, (version,), {})


def _build(state: State, host: Host, version: str) -> bool:
    absent = [h.name for h in inventory.get_group("builder") if h not in rolling.members("builder")]
    fault = f"{', '.join(absent)}, the builder, is not in this run" if absent else None
    for member in dict.fromkeys([builder(), *rolling.members("workers")]):
        if fault:
            logger.warning(f"{fault}: {member.name} builds {version}")
        fault = _build_on(member, version)
        if not fault or run(member, "true") is None:
            break
        fault = f"{member.name} is lost"
    if fault:
        logger.error(f"{host.print_prefix}{version} is not built: {fault}. Nothing was released.")
    return not fault


def _build_on(member: Host, version: str) -> str | None:
    """Why it is not built and in that worker's registry, or None."""
    folder = Path(member.data.app_folder)
    tar = f"/var/tmp/{member.data.app_name}-{version}.tar"
    tag = f"{held.repository(member.data)}:{version}"
    try:
        context = image.build_context(folder, artifact.ARCHES[member.get_fact(Arch)])
        logger.info(f"{member.print_prefix}building {tag}")
        if not member.put_file(BytesIO(context), tar, _sudo=True):
            run(member, f"rm -f {tar}")
            return f"{tar} cannot be written, see above"
    except (image.ImageError, EOFError, *cluster.Unavailable) as error:
        return said(error)
    command = build_command(member.data.app_base_image, tag, version, image.source_hash(folder), tar)
    return run(member, command) or run(member, registry_access.push_command(member.data, tag))


def build_command(base: str, tag: str, version: str, source: str, tar: str) -> str:
    """`docker build` from a tar on the host, which is gone afterwards."""
    arguments = {"APP_VERSION": version, "BASE_IMAGE": base}
    labels = {"hashistack.source": source, "hashistack.version": version}
    words = [f"--build-arg {shlex.quote(f'{key}={value}')}" for key, value in arguments.items()]
    words += [f"--label {shlex.quote(f'{key}={value}')}" for key, value in labels.items()]
    return f"trap 'rm -f {tar}' EXIT; docker build -q --force-rm -t {tag} {' '.join(words)} - < {tar}"


@operation()
def go_on_without_the_lost() -> Generator[str]:
    """A worker that is lost from here on leaves the run and the others go on; the exit code is still 1."""
    state.config.FAIL_PERCENT = None
    host.noop("the others go on")
    yield from ()


def _left_behind(state: State, host: Host, fault: str) -> bool:
    """A worker that is lost leaves the run alone; one that answers but fails ends it for all."""
    lost = run(host, "true") is not None
    if not lost:
        state.config.FAIL_PERCENT = 0
    logger.error(f"{host.print_prefix}{fault}; {'it is lost' if lost else 'nothing was released'}")
    return False


@operation()
def copy(version: str) -> Generator[FunctionCommand]:
    """Bring the image from a registry that holds it to this worker's own; the digest stays the same."""
    if version in held.by_all():
        host.noop(f"every worker's Docker holds {version}")
    elif host in digests(version):
        host.noop(f"the registry holds {version}")
    else:
        yield FunctionCommand(_copy, (version,), {})


def _copy(state: State, host: Host, version: str) -> bool:
    if host in digests(version):
        return True  # a silent registry looked empty
    fault = run(host, f"{registry.SYNC} fetch {version}")
    return not fault or _left_behind(state, host, f"{version} is not in its registry: {fault}")


@operation()
def pull(version: str) -> Generator[FunctionCommand]:
    """Have the image in this worker's Docker before anything is started from it."""
    wanted = digest_of(version)
    if wanted and host.get_fact(DockerImage, object_id=f"{held.repository(host.data)}@{wanted}"):
        host.noop(f"{version} is pulled")
        return
    yield FunctionCommand(_pull, (version,), {})


def _pull(state: State, host: Host, version: str) -> bool:
    try:
        fault = run(host, f"docker pull -q {held.repository(host.data)}@{digest(host, version)}")
    except cluster.Unavailable as error:
        fault = said(error)
    return not fault or _left_behind(state, host, f"{version} cannot be pulled: {fault}")


# A worker that is new or was away


class Missing(FactBase[list[str]]):
    """The versions that other registries hold and this worker's does not."""

    default = list

    def command(self) -> str:
        return f"test ! -x {registry.SYNC} || {registry.SYNC} missing"

    def process(self, output: Iterable[str]) -> list[str]:
        return [line.split()[0] for line in output]


@operation()
def resync() -> Generator[str | FunctionCommand]:
    """Do now what the worker's timer would do within minutes, and bring what runs to its Docker.

    A worker that joins or was away would otherwise be sent instances whose image it cannot get.
    """
    if host.get_fact(Missing):
        yield f"{registry.SYNC} fetch"
    else:
        host.noop("it holds what the others hold")
    for version in _running():
        yield from pull._inner(version=version)


def _running() -> set[str]:
    try:
        return serving.running_versions() - {"unknown"}
    except cluster.Unavailable:
        return set()
