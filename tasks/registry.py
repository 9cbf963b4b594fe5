"""A registry on each worker, and the images that the workers hold from the start."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from nomad import Nomad
from pyinfra import host
from pyinfra.api import FileUploadCommand, StringCommand, deploy, operation
from pyinfra.api.command import QuoteString
from pyinfra.facts.docker import DockerImage
from pyinfra.facts.server import Arch, Which

from tasks import artifact, config, containers, nomad_acl, rolling
from tasks.cluster import consul_api, nomad_api
from tasks.mirror import cache_dir

SYNC = "/usr/local/sbin/registry-sync"
SYSTEMD = "/etc/systemd/system"
TIMER_UNITS = [f"{SYSTEMD}/registry-sync.service", f"{SYSTEMD}/registry-sync.timer"]


@deploy("Registry")
def install() -> None:
    config.write(
        name="Configure the registry's synchronisation",
        files=[
            config.File("/etc/registry-sync.conf", config.render("registry/registry-sync.conf.j2")),
            config.File(SYNC, config.render("registry/registry-sync"), mode="755"),
            config.File(TIMER_UNITS[0], config.render("registry/registry-sync.service")),
            config.File(TIMER_UNITS[1], config.render("registry/registry-sync.timer.j2")),
        ],
    )
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
    leads = host.name == rolling.members("workers")[0].name
    if leads and host.data.scheduler == "nomad":
        rolling.change_by_api(name="Run a registry on each worker", differs=_job_differs, change=_register)
    if leads:
        rolling.wait_until_healthy(
            name="Wait until each registry answers", what="the registries", fault=_missing
        )


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
        config.render("registry/registry.nomad.hcl.j2", namespace=nomad_acl.PLATFORM)
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
    return f"not answering yet: {', '.join(missing)}" if missing else None
