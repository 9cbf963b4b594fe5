"""Docker on the workers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host

from group_data import all as knobs
from tests.lab import hosts

testinfra_hosts = hosts.testinfra("workers")

SETTINGS = "/etc/docker/daemon.json"
LOOPBACK = {"127.0.0.0/8", "::1/128"}


@pytest.fixture(scope="module")
def info(host: Host) -> dict[str, Any]:
    """What the engine says of itself."""
    found: dict[str, Any] = json.loads(host.check_output("docker info --format '{{json .}}'"))
    return found


@pytest.mark.parametrize("unit", ["docker", "containerd"])
def test_runs(host: Host, unit: str) -> None:
    assert host.service(unit).is_running


def test_starts_at_boot(host: Host) -> None:
    assert host.service("docker").is_enabled


def test_settings_are_older_than_the_engine(host: Host) -> None:
    """So all of them are in effect, those too that the engine does not tell."""
    started = host.check_output('date +%s -d "$(systemctl show -P ActiveEnterTimestamp docker)"')
    assert int(host.check_output("stat -c %%Y %s", SETTINGS)) <= int(started)


def test_settings_are_roots(host: Host) -> None:
    file = host.file(SETTINGS)
    assert (file.mode, file.user) == (0o644, "root")


def test_containers_outlive_the_engine(info: dict[str, Any]) -> None:
    assert info["LiveRestoreEnabled"]


def test_logs_are_files(info: dict[str, Any]) -> None:
    assert info["LoggingDriver"] == "json-file"


def test_logs_rotate(host: Host) -> None:
    limits = {"max-size": knobs.docker_log_max_size, "max-file": str(knobs.docker_log_max_file)}
    assert json.loads(host.file(SETTINGS).content_string)["log-opts"] == limits


def test_networks_come_from_the_pool(info: dict[str, Any]) -> None:
    assert [pool["Base"] for pool in info["DefaultAddressPools"]] == [knobs.docker_address_pool]


def test_bridge_has_its_address(host: Host) -> None:
    assert knobs.docker_bip in host.check_output("ip -4 -o address show docker0").split()


def test_bridge_overlaps_no_network_of_the_host(host: Host) -> None:
    routes = host.check_output("ip -4 route show match %s", knobs.docker_bip.split("/")[0])
    assert [line.split()[2] for line in routes.splitlines() if not line.startswith("default")] == ["docker0"]


def test_no_insecure_registry_in_effect(info: dict[str, Any]) -> None:
    """Loopback is Docker's own default."""
    insecure = set(info["RegistryConfig"]["InsecureRegistryCIDRs"]) - LOOPBACK
    insecure |= {
        name for name, index in info["RegistryConfig"]["IndexConfigs"].items() if not index["Secure"]
    }
    assert insecure == set()


def test_no_insecure_registry_configured(host: Host) -> None:
    places = "/etc/docker /etc/default /etc/systemd/system /lib/systemd/system/docker.service"
    assert host.run(f"grep -rIl insecure-registr {places}").stdout == ""


def test_socket_is_for_root(host: Host) -> None:
    file = host.file("/run/docker.sock")
    assert (file.mode, file.user, file.group) == (0o660, "root", "docker")


def test_nobody_else_is_in_dockers_group(host: Host) -> None:
    assert host.group("docker").members == []


@pytest.mark.skipif(hosts.SCHEDULER != "docker", reason="with Nomad, it is Nomad that waits for the address")
def test_waits_for_the_private_address(host: Host) -> None:
    assert "private-address.service" in host.check_output("systemctl show -P Requires docker").split()
