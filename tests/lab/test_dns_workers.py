"""DNS in a worker's containers."""

from __future__ import annotations

import pytest
from testinfra.host import Host

from group_data import all as knobs
from tests.lab import hosts

testinfra_hosts = hosts.testinfra("workers")


def in_container(host: Host, program: str) -> str:
    """What a Python program prints in a new container, which has DNS as the app's do."""
    run = "docker run --rm --entrypoint python3 %s -c %s"
    return str(host.check_output(run, knobs.app_base_image, program))


@pytest.fixture(scope="module")
def found(host: Host) -> dict[str, str]:
    """What these names are in a container, all asked in one: name -> "address address"."""
    names = [
        f"{knobs.app_name}.service.consul",
        "consul.service.consul",
        "no-such-name.service.consul",
        *hosts.HOSTS,
    ]
    lines = in_container(
        host,
        f"""
import socket
for name in {names}:
    try:
        print(name, *sorted(set(socket.gethostbyname_ex(name)[2])))
    except socket.gaierror:
        print(name)
""",
    ).splitlines()
    return {name: addresses.strip() for name, _, addresses in (line.partition(" ") for line in lines)}


def test_consul_resolves(found: dict[str, str]) -> None:
    servers = {hosts.HOSTS[name]["address"] for name in hosts.names("servers")}
    assert set() < set(found["consul.service.consul"].split()) <= servers


def test_app_resolves(found: dict[str, str]) -> None:
    instances = {name.rsplit("-", 2)[1] for name in hosts.consul_instances()}
    assert set() < set(found[f"{knobs.app_name}.service.consul"].split()) <= instances


def test_unknown_service_does_not_resolve(found: dict[str, str]) -> None:
    assert found["no-such-name.service.consul"] == ""


@pytest.mark.skipif(hosts.SETTINGS.provider != "docker", reason="only Docker's own DNS knows the lab's hosts")
@pytest.mark.parametrize("other", hosts.HOSTS)
def test_other_names_resolve(found: dict[str, str], other: str) -> None:
    assert hosts.HOSTS[other]["address"] in found[other].split()


def test_container_asks_the_host(host: Host) -> None:
    lines = in_container(host, "print(open('/etc/resolv.conf').read())").splitlines()
    asked = [line.split()[1] for line in lines if line.startswith("nameserver")]
    assert asked == [knobs.docker_bip.split("/")[0]]
