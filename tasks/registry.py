"""A registry on each worker, and the images that the workers hold from the start."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from nomad import Nomad
from pyinfra import host
from pyinfra.api import FactBase, FileUploadCommand, StringCommand, deploy, operation
from pyinfra.api.command import QuoteString
from pyinfra.facts.docker import DockerImage
from pyinfra.facts.server import Arch, Which

from tasks import artifact, config, containers, nomad_acl, registry_access, rolling
from tasks.cluster import consul_api, nomad_api
from tasks.mirror import cache_dir

SYNC = "/usr/local/sbin/registry-sync"
SYSTEMD = "/etc/systemd/system"
TIMER_UNITS = [f"{SYSTEMD}/registry-sync.service", f"{SYSTEMD}/registry-sync.timer"]


@deploy("Registry")
def configure() -> None:
    """Before Nomad starts, which wants to see what it shall show to containers."""
    settings = config.render("registry/registry-sync.conf.j2", client=registry_access.CLIENT)
    config.write(
        name="Configure the registry and its synchronisation",
        files=[
            *registry_access.files(host),
            config.File("/etc/registry-sync.conf", settings),
            config.File(SYNC, config.render("registry/registry-sync"), mode="755"),
            config.File(TIMER_UNITS[0], config.render("registry/registry-sync.service")),
            config.File(TIMER_UNITS[1], config.render("registry/registry-sync.timer.j2")),
        ],
    )


def trust(pem: str) -> None:
    """While the CA is changed."""
    files = registry_access.trusted(host.data, pem)
    config.write(name="Write which CA the registry's clients trust", files=files)


@deploy("Registry")
def install() -> None:
    rolling.restart_if_stale(
        name="Start the timer that synchronises the registry",
        unit="registry-sync.timer",
        files=TIMER_UNITS,
        since="ActiveEnterTimestamp",  # a timer has no process
    )
    for image, tar in host.loop(list(images().items())):
        load_image(name=f"Load the image {image}", image=image, tar=tar)


def images() -> dict[str, Path]:
    """Image -> the file on the controller that holds it, for this host's architecture."""
    arch = artifact.ARCHES[host.get_fact(Arch)]
    names = {"registry": host.data.registry_image, "app-base": host.data.app_base_image}
    return {image: cache_dir() / "images" / f"{name}_{arch}.tar" for name, image in names.items()}


def faults() -> list[str]:
    """What keeps this worker from getting its images, a line each. Changes nothing."""
    return [
        f"{host.name}: {image} is not in {tar}; make it with `python3 -m lab.images {tar.stem.split('_')[1]}`"
        for image, tar in images().items()
        if image.startswith("hashistack/") and not holds(tar, image) and not _loaded(image)
    ]


def _loaded(image: str) -> bool:
    return bool(host.get_fact(Which, command="docker") and host.get_fact(DockerImage, object_id=image))


def holds(tar: Path, image: str) -> bool:
    """Whether a file made by `docker save` has this image; a changed knob may name another one."""
    if not tar.exists():
        return False
    with tarfile.open(tar) as file:
        manifest = file.extractfile("manifest.json")
        return manifest is not None and any(image in one["RepoTags"] for one in json.load(manifest))


@deploy("Registry")
def run() -> None:
    """One on each worker; Nomad sees to those to come, too."""
    if host.data.scheduler == "docker":
        containers.run_registry()
    leads = rolling.leads("workers")
    if leads and host.data.scheduler == "nomad":
        rolling.change_by_api(name="Run a registry on each worker", differs=_job_differs, change=_register)
    take_new_certificate(name="Restart a registry whose certificate is newer")
    if leads:
        rolling.wait_until_healthy(
            name="Wait until each registry answers", what="the registries", fault=_missing
        )


class IsOld(FactBase[bool]):
    """Whether the registry that can be written to has started before its certificate was renewed."""

    def command(self) -> str:
        files = " ".join(registry_access.READS_AT_START)
        return (
            'id=$(docker ps -q --filter name=^registry | head -n 1); test -z "$id" ||'
            f" find {files} -newermt \"$(docker inspect -f '{{{{.State.StartedAt}}}}' $id)\""
        )

    def process(self, output: Iterable[str]) -> bool:
        return bool(list(output))


@operation()
def take_new_certificate() -> Generator[str]:
    """It reads it only when it starts. Docker goes on to pull from the other listener meanwhile."""
    if not host.data.secure or not host.get_fact(IsOld):
        host.noop("it runs with its current certificate")
        return
    # Nomad starts it again by itself, in a new container.
    what = "stop" if host.data.scheduler == "nomad" else "restart"
    yield f"docker ps -q --filter name=^registry | xargs -r docker {what}"


@operation()
def load_image(image: str, tar: Path) -> Generator[FileUploadCommand | StringCommand]:
    """Load `image` from a `docker save` file on the controller, or pull it where there is none."""
    if host.get_fact(DockerImage, object_id=image):
        host.noop(f"{image} is loaded")
    elif holds(tar, image):
        upload = f"/var/tmp/{tar.name}"
        yield FileUploadCommand(str(tar), upload)
        yield StringCommand("docker load -q -i", QuoteString(upload), "&& rm", QuoteString(upload))
    else:
        yield StringCommand("docker pull -q", QuoteString(image))


def _job_differs() -> str | None:
    with nomad_api(host) as api:
        job = _job(api)
        if nomad_acl.PLATFORM not in {one["Name"] for one in api.namespaces.get_namespaces()}:
            return "it has no namespace yet"
        plan = api.job.plan_job(job["ID"], {"Job": job}, diff=True)
    return None if plan["Diff"]["Type"] == "None" else "the plan shows a difference"


def _job(api: Nomad) -> dict[str, Any]:
    parsed: dict[str, Any] = api.jobs.parse(
        config.render(
            "registry/registry.nomad.hcl.j2",
            namespace=nomad_acl.PLATFORM,
            listener=registry_access.listener(),
            read_only=registry_access.READ_ONLY,
        )
    )
    return parsed


def _register() -> None:
    with nomad_api(host) as api:
        job = _job(api)
        _make_room(api)
        api.job.register_job(job["ID"], {"Job": job})


def _make_room(api: Nomad) -> None:
    """Its namespace; and no registry in the app's, where it ran before and holds the port."""
    with nomad_api(host, "bootstrap") as manager:  # no other token may
        manager.namespace.create_namespace({"Name": nomad_acl.PLATFORM})
    if "registry" in {job["ID"] for job in api.jobs.get_jobs(namespace="default")}:
        api.job.deregister_job("registry", purge=True, namespace="default")


def _missing() -> str | None:
    with consul_api(host) as api:
        entries = api.health.service("registry", passing=True)[1]
    answering = {entry["Node"]["Node"] for entry in entries}
    missing = [m.name for m in rolling.members("workers") if m.name not in answering]
    if missing:
        return f"not answering yet: {', '.join(missing)}"
    return _being_replaced() if host.data.scheduler == "nomad" else None


def _being_replaced() -> str | None:
    """Nomad replaces one after the other; a release must not meet those of before."""
    with nomad_api(host) as api:
        where = {"namespace": nomad_acl.PLATFORM}
        deployment = api.job.request("registry", "deployment", method="get", params=where).json()
    running = deployment and deployment["Status"] == "running"
    return "Nomad replaces them one by one" if running else None
