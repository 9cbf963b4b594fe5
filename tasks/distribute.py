"""An app image's way: built once on the builder, copied to each worker's registry, pulled by digest.

What the registries hold is the truth: a version is released when one of them has it, and its image is
never built again. Registries are read from the controller, through SSH.
"""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Generator
from io import BytesIO
from pathlib import Path

import requests
from pyinfra import host, logger, state
from pyinfra.api import FunctionCommand, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.facts.docker import DockerImage
from pyinfra.facts.server import Arch

from tasks import artifact, cluster, held, image, rolling, serving, shell

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


def _get(member: Host, path: str) -> requests.Response | None:
    """What the registry on `member` has at /v2/<app>/<path>; None for nothing, else Unavailable."""
    with cluster.forward(member, member.data.registry_port) as port, cluster.http_session() as http:
        url = f"http://127.0.0.1:{port}/v2/{member.data.app_name}/{path}"
        answer = http.get(url, headers={"Accept": _MANIFEST}, timeout=cluster.TIMEOUT_S)
    if answer.status_code == 404:
        return None
    answer.raise_for_status()
    return answer


def digest(member: Host, version: str) -> str | None:
    """sha256:... of the image of `version` in the registry on `member`, or None."""
    answer = _get(member, f"manifests/{version}")
    return answer.headers["Docker-Content-Digest"] if answer else None


def catalogue(member: Host, most: int = 20) -> dict[str, str]:
    """Version -> digest of what the registry on `member` holds, the newest `most` of them by number."""
    tags = _get(member, "tags/list")
    versions = (tags.json()["tags"] or []) if tags else []
    newest = sorted(versions, key=artifact.order, reverse=True)[:most]
    with cluster.forward(member, member.data.registry_port) as port, cluster.http_session() as http:
        url = f"http://127.0.0.1:{port}/v2/{member.data.app_name}/manifests"
        answers = {
            version: http.head(f"{url}/{version}", headers={"Accept": _MANIFEST}, timeout=cluster.TIMEOUT_S)
            for version in newest
        }
    return {v: a.headers["Docker-Content-Digest"] for v, a in answers.items() if a.ok}


def source(member: Host, version: str) -> str:
    """The hash of the folder that the image was built from; "" if it does not say."""
    manifest = _get(member, f"manifests/{version}")
    config = manifest and _get(member, f"blobs/{manifest.json()['config']['digest']}")
    labels: dict[str, str] = config.json()["config"].get("Labels") or {} if config else {}
    return labels.get("hashistack.source", "")


def was_released(version: str) -> bool:
    """Some registry of this run holds it. One that does not answer may: that raises Unavailable."""
    return any([digest(member, version) for member in rolling.members("workers")])


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
    """From the registries, or where none has it from every worker's Docker; "" for neither."""
    found = next(iter(digests(version).values()), "")
    if found:
        return found
    kept = held.by_all().get(version)
    return kept.digest if kept else ""


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


@operation()
def build(version: str) -> Generator[FunctionCommand]:
    """Build the image on this host and push it to its registry, unless `version` was released."""
    if digest_of(version):
        host.noop(f"{version} was released before: its image is used")
        return
    yield FunctionCommand(_build, (version,), {})


def _build(state: State, host: Host, version: str) -> bool:
    folder = Path(host.data.app_folder)
    tar = f"/var/tmp/{host.data.app_name}-{version}.tar"
    tag = f"{held.repository(host.data)}:{version}"
    try:
        if was_released(version):
            return True
        context = image.build_context(folder, artifact.ARCHES[host.get_fact(Arch)])
        logger.info(f"{host.print_prefix}building {tag}")
        if host.put_file(BytesIO(context), tar, _sudo=True):
            command = build_command(host.data.app_base_image, tag, version, image.source_hash(folder), tar)
            fault = run(host, command) or run(host, f"docker push -q {tag}")
        else:
            run(host, f"rm -f {tar}")
            fault = f"{tar} cannot be written, see above"
    except (image.ImageError, *cluster.Unavailable) as error:
        fault = said(error)
    if fault:
        logger.error(f"{host.print_prefix}{version} is not built: {fault}. Nothing was released.")
    return not fault


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
    if host in digests(version):
        host.noop(f"the registry holds {version}")
        return
    if version in held.by_all() and _silent(host, version):
        logger.warning(f"{host.print_prefix}its registry does not answer; its Docker holds {version}")
        host.noop(f"Docker holds {version}")
        return
    yield FunctionCommand(_copy, (version,), {})


def _silent(member: Host, version: str) -> bool:
    try:
        digest(member, version)
    except cluster.Unavailable:
        return True
    return False


def _copy(state: State, host: Host, version: str) -> bool:
    holders = digests(version)
    if host in holders:
        return True  # a silent registry looked empty
    fault = run(next(iter(holders)), copy_command(host, version)) if holders else "no registry holds it"
    return not fault or _left_behind(state, host, f"{version} is not in its registry: {fault}")


def copy_command(member: Host, version: str) -> str:
    """Run where the image is: from the local registry to the one on `member`."""
    name = f"{member.data.app_name}:{version}"
    port = member.data.registry_port
    return (
        "skopeo copy --quiet --preserve-digests --src-tls-verify=false --dest-tls-verify=false"
        f" docker://127.0.0.1:{port}/{name} docker://{member.data.address}:{port}/{name}"
    )


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


@operation()
def resync() -> Generator[FunctionCommand]:
    """Bring what the other registries hold to this worker's own, and what runs to its Docker.

    A worker that joins or was away would otherwise be sent instances whose image it cannot get.
    """
    versions = _lacking()
    if not versions:
        host.noop("it holds what the others hold")
    for version in versions:
        yield FunctionCommand(_copy, (version,), {})
    for version in _running():
        yield from pull._inner(version=version)


def _lacking() -> list[str]:
    """Versions that only other registries hold; those that do not answer are left out."""
    others = {version for member in rolling.members("workers") for version in _versions(member)}
    return sorted(others - _versions(host))


def _versions(member: Host) -> set[str]:
    try:
        answer = _get(member, "tags/list")
    except cluster.Unavailable:
        return set()
    return set(answer.json()["tags"] or []) if answer else set()


def _running() -> set[str]:
    try:
        return serving.running_versions() - {"unknown"}
    except cluster.Unavailable:
        return set()
