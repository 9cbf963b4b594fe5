"""The app's images that the workers hold in Docker: what a rollback needs, without build or registry."""

from __future__ import annotations

from dataclasses import dataclass

import gevent  # type: ignore[import-untyped]
from paramiko import SSHException
from pyinfra.api.host import Host, HostData

from tasks import rolling, shell


@dataclass(frozen=True)
class Image:
    """digest: sha256:..., the same everywhere. source: the hash of what it was built from."""

    digest: str
    source: str


Images = dict[str, Image]  # by version


def repository(data: HostData) -> str:
    """A worker's own registry, as images are named in its Docker."""
    return f"127.0.0.1:{data.registry_port}/{data.app_name}"


def images(member: Host) -> Images:
    """What Docker on this worker holds; nothing for one that cannot be asked."""
    labels = " ".join(f'{{{{index .Config.Labels "hashistack.{name}"}}}}' for name in ("version", "source"))
    ask = f"docker image inspect --format '{labels} {{{{join .RepoDigests \" \"}}}}'"
    name = repository(member.data)
    try:
        _, output = shell.run(member, f"docker images --quiet --no-trunc {name} | sort -u | xargs -r {ask}")
    except (SSHException, EOFError, OSError):
        return {}
    return parse(output.stdout_lines, name)


def parse(lines: list[str], name: str) -> Images:
    """Lines of "version source repository@digest ..."; what has no label or no digest is not ours."""
    found = {}
    for version, source, *digests in (line.split(" ") for line in lines):
        ours = [one.removeprefix(f"{name}@") for one in digests if one.startswith(f"{name}@")]
        if version and ours:
            found[version] = Image(ours[0], source)
    return found


def everywhere(found: list[Images]) -> Images:
    """Those that all of them hold, with one digest."""
    first, *others = found or [{}]
    return {v: image for v, image in first.items() if all(other.get(v) == image for other in others)}


def survey() -> dict[str, Images]:
    """Worker of this run -> what it holds."""
    members = rolling.members("workers")
    jobs = [gevent.spawn(images, member) for member in members]
    gevent.joinall(jobs, raise_error=True)
    return {member.name: job.value for member, job in zip(members, jobs, strict=True)}


def by_all() -> Images:
    """What every worker of this run holds."""
    return everywhere(list(survey().values()))
