"""A registry on each worker, with the same images."""

from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host

from group_data import all as knobs
from tasks import registry_access
from tests.lab import hosts

testinfra_hosts = hosts.testinfra("workers")

WORKERS = hosts.names("workers")
TLS = f"--authfile={registry_access.CLIENT}/config.json --cert-dir={registry_access.CLIENT}"


@pytest.fixture(scope="module")
def container(host: Host) -> dict[str, Any]:
    """The running registry, as Docker describes it."""
    (found,) = json.loads(host.check_output("docker inspect $(docker ps -q --filter name=^registry)"))
    return dict(found)


@pytest.fixture(scope="module")
def digest() -> str:
    """Of the image that serves: the instances' containers name it."""
    running = f"docker ps --quiet --filter name=^{knobs.app_name}-"
    images = f"{running} | xargs -r docker inspect --format '{{{{.Config.Image}}}}'"
    (image,) = set("".join(hosts.on_all(WORKERS, images).values()).split())
    return image.partition("@")[2]


def test_image_is_ours(container: dict[str, Any]) -> None:
    assert container["Config"]["Image"] == knobs.registry_image


def test_drops_all_capabilities(container: dict[str, Any]) -> None:
    assert [name.upper() for name in container["HostConfig"]["CapDrop"]] == ["ALL"]


def test_is_not_privileged(container: dict[str, Any]) -> None:
    assert not container["HostConfig"]["Privileged"]


def test_keeps_images_on_the_host(container: dict[str, Any]) -> None:
    assert ("/var/lib/registry", "/var/lib/registry") in {
        (mount["Source"], mount["Destination"]) for mount in container["Mounts"]
    }


@pytest.mark.skipif(hosts.SCHEDULER != "docker", reason="with Nomad, Nomad starts it after a reboot")
def test_comes_back_by_itself(container: dict[str, Any]) -> None:
    assert container["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"


def test_folder_is_roots(host: Host) -> None:
    file = host.file("/var/lib/registry")
    assert (file.mode, file.user, file.group) == (0o700, "root", "root")


@pytest.mark.parametrize("image", [knobs.registry_image, knobs.app_base_image])
def test_image_is_preloaded(host: Host, image: str) -> None:
    assert host.run("docker image inspect %s", image).rc == 0


@pytest.mark.parametrize("where", ["loopback", "private"])
def test_holds_the_image_that_serves(host: Host, digest: str, where: str) -> None:
    """At both addresses, on every worker, the same bytes: the digest is their sum."""
    address = "127.0.0.1" if where == "loopback" else hosts.address_of(host)
    image = f"docker://{address}:{knobs.registry_port}/{knobs.app_name}:{hosts.running_version()}"
    access = TLS if where == "private" and hosts.knob("secure") else "--tls-verify=false"
    manifest = host.check_output(f"skopeo inspect --raw {access} {image} | sha256sum")
    assert f"sha256:{manifest.split()[0]}" == digest


def test_every_worker_holds_the_same_versions() -> None:
    tags = [hosts.api(name, knobs.registry_port, f"/v2/{knobs.app_name}/tags/list") for name in WORKERS]
    assert len({tuple(sorted(found["tags"])) for found in tags}) == 1


def test_consul_sees_each_one_answer() -> None:
    entries = hosts.api(WORKERS[0], knobs.consul_http_port, "/v1/health/service/registry?passing")
    assert {(entry["Node"]["Node"], entry["Service"]["Address"]) for entry in entries} == {
        (name, hosts.HOSTS[name]["address"]) for name in WORKERS
    }


def test_a_worker_fetches_what_it_lacks_by_itself() -> None:
    """As one that was rebuilt: its registry is empty."""
    holds = hosts.api(WORKERS[0], knobs.registry_port, f"/v2/{knobs.app_name}/tags/list")
    hosts.on(WORKERS[0], "rm -r /var/lib/registry/docker")
    hosts.wait_for(
        "its timer to have fetched all",
        lambda: hosts.api(WORKERS[0], knobs.registry_port, f"/v2/{knobs.app_name}/tags/list") == holds,
        150,
    )
    assert hosts.on(WORKERS[0], "registry-sync missing") == ""
    hosts.wait_for("it to be done", lambda: "inactive" in hosts.on(WORKERS[0], _STATE))


_STATE = "systemctl show -P ActiveState registry-sync.service"
