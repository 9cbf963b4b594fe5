"""Nomad on the workers; what only servers have is asked of each server by name."""

from __future__ import annotations

from typing import Any

import pytest
from testinfra.host import Host

from group_data import all as knobs
from tests.lab import hosts

testinfra_hosts = hosts.testinfra("workers")
pytestmark = pytest.mark.skipif(hosts.SCHEDULER != "nomad", reason="the docker scheduler does without Nomad")

SERVERS = hosts.names("servers")
WORKERS = hosts.names("workers")
CONFIG = "/etc/nomad.d/nomad.hcl"


def ask(name: str, path: str) -> Any:  # noqa: ANN401
    return hosts.api(name, knobs.nomad_http_port, path)


@pytest.fixture(scope="module")
def settings(host: Host) -> dict[str, Any]:
    """The settings that the agent runs with, defaults included."""
    found: dict[str, Any] = ask(hosts.name_of(host), "/v1/agent/self")["config"]
    return found


@pytest.fixture(scope="module")
def docker_plugin(settings: dict[str, Any]) -> dict[str, Any]:
    (found,) = [plugin["Config"] for plugin in settings["Plugins"] if plugin["Name"] == "docker"]
    return dict(found)


@pytest.fixture(scope="module")
def node(host: Host) -> dict[str, Any]:
    """This worker as the servers know it."""
    nodes = ask(hosts.name_of(host), "/v1/nodes?resources=true")
    (mine,) = [node for node in nodes if node["Name"] == hosts.name_of(host) and node["Status"] != "down"]
    found: dict[str, Any] = ask(hosts.name_of(host), f"/v1/node/{mine['ID']}")
    return found


def test_runs(host: Host) -> None:
    assert host.service("nomad").is_running


def test_starts_at_boot(host: Host) -> None:
    assert host.service("nomad").is_enabled


@pytest.mark.parametrize(
    ("setting", "value"),
    # A restarted agent finds its tasks as they were, and an interrupt is no farewell (SIGINT = 2).
    [("KillMode", "process"), ("KillSignal", "2"), ("Restart", "always"), ("OOMScoreAdjust", "-1000")],
)
def test_unit(host: Host, setting: str, value: str) -> None:
    assert host.check_output("systemctl show -P %s nomad", setting) == value


def test_waits_for_the_private_address(host: Host) -> None:
    assert "private-address.service" in host.check_output("systemctl show -P Requires nomad").split()


def test_installed_version_runs(host: Host) -> None:
    binary = f"/usr/local/lib/nomad/{hosts.knob('nomad_version')}/nomad"
    assert host.check_output("readlink /proc/$(systemctl show -P MainPID nomad)/exe") == binary


@pytest.mark.parametrize(("path", "mode"), [(CONFIG, 0o600), ("/var/lib/nomad", 0o700)])
def test_mode_and_owner(host: Host, path: str, mode: int) -> None:
    file = host.file(path)
    assert (file.mode, file.user, file.group) == (mode, "root", "root")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("LeaveOnInt", False),
        ("LeaveOnTerm", False),
        ("DisableUpdateCheck", True),
        ("Region", knobs.nomad_region),
        ("Datacenter", knobs.consul_datacenter),
    ],
)
def test_setting_is_in_effect(settings: dict[str, Any], setting: str, value: object) -> None:
    assert settings[setting] == value


def test_is_a_server_in_that_group_only(host: Host, settings: dict[str, Any]) -> None:
    assert settings["Server"]["Enabled"] == (hosts.name_of(host) in SERVERS)


def test_rejoins_for_ever(settings: dict[str, Any]) -> None:
    assert settings["Client"]["ServerJoin"]["RetryMaxAttempts"] == 0


def test_asks_no_cloud_about_itself(settings: dict[str, Any]) -> None:
    denied = settings["Client"]["Options"]["fingerprint.denylist"].split(",")
    assert {"env_aws", "env_gce", "env_azure", "env_digitalocean"} <= set(denied)


def test_is_on_the_private_address(host: Host, node: dict[str, Any]) -> None:
    assert node["Attributes"]["unique.network.ip-address"] == hosts.address_of(host)


@pytest.mark.parametrize("setting", ["allow_privileged", "allow_caps", "volumes"])
def test_docker_tasks_get_no_power_over_the_host(docker_plugin: dict[str, Any], setting: str) -> None:
    assert docker_plugin[setting] in (False, [], {"enabled": False, "selinuxlabel": None})


@pytest.mark.parametrize("feature", ["driver.docker.privileged.enabled", "driver.docker.volumes.enabled"])
def test_servers_place_no_powerful_task_here(node: dict[str, Any], feature: str) -> None:
    assert feature not in node["Attributes"]


def test_old_images_stay_for_a_rollback(docker_plugin: dict[str, Any]) -> None:
    assert docker_plugin["gc"]["image_delay"] == knobs.nomad_image_delay


def test_registrys_volume_is_the_only_one(node: dict[str, Any]) -> None:
    assert set(node["HostVolumes"]) == {"registry"}


def test_docker_is_the_only_driver(node: dict[str, Any]) -> None:
    assert {name: driver["Healthy"] for name, driver in node["Drivers"].items() if driver["Detected"]} == {
        "docker": True
    }


@pytest.mark.parametrize(
    ("resource", "amount"),
    [
        (("Cpu", "CpuShares"), knobs.nomad_reserved_cpu_mhz),
        (("Memory", "MemoryMB"), knobs.nomad_reserved_memory_mb),
    ],
)
def test_host_keeps_its_share(node: dict[str, Any], resource: tuple[str, str], amount: int) -> None:
    kind, unit = resource
    assert node["ReservedResources"][kind][unit] == amount


def test_client_is_ready(node: dict[str, Any]) -> None:
    assert (node["Status"], node["SchedulingEligibility"]) == ("ready", "eligible")


def test_no_stranger_among_the_clients() -> None:
    ready = {node["Name"] for node in ask(SERVERS[0], "/v1/nodes") if node["Status"] == "ready"}
    assert ready == set(WORKERS)


@pytest.mark.parametrize("server", SERVERS)
def test_server_expects_the_others(server: str) -> None:
    assert ask(server, "/v1/agent/self")["config"]["Server"]["BootstrapExpect"] == len(SERVERS)


def test_all_know_one_leader() -> None:
    leaders = {ask(name, "/v1/status/leader") for name in WORKERS}
    assert len(leaders & {f"{hosts.HOSTS[name]['address']}:4647" for name in SERVERS}) == len(leaders) == 1


@pytest.fixture(scope="module")
def health() -> dict[str, Any]:
    found: dict[str, Any] = ask(SERVERS[0], "/v1/operator/autopilot/health")
    return found


def test_voters_are_the_servers(health: dict[str, Any]) -> None:
    voters = {server["Name"] for server in health["Servers"] if server["Voter"]}
    assert voters == {f"{name}.{knobs.nomad_region}" for name in SERVERS}


def test_autopilot_is_healthy(health: dict[str, Any]) -> None:
    assert health["Healthy"]


def test_a_server_can_be_spared(health: dict[str, Any]) -> None:
    assert health["FailureTolerance"] == (len(SERVERS) - 1) // 2


def test_autopilot_keeps_the_quorum() -> None:
    assert ask(SERVERS[0], "/v1/operator/autopilot/configuration")["MinQuorum"] == len(SERVERS)


@pytest.mark.parametrize("service", ["nomad", "nomad-client"])
def test_consul_knows_it(service: str) -> None:
    entries = hosts.api(SERVERS[0], knobs.consul_http_port, f"/v1/health/service/{service}?passing")
    wanted = SERVERS if service == "nomad" else WORKERS
    assert {entry["Node"]["Node"] for entry in entries} == set(wanted)
