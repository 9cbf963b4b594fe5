"""Consul on every host; what only servers have is asked of each server by name."""

from __future__ import annotations

from typing import Any

import pytest
from testinfra.host import Host

from group_data import all as knobs
from tests.lab import hosts

testinfra_hosts = hosts.testinfra("workers", "proxies")

SERVERS = hosts.names("servers")
ADDRESSES = [hosts.HOSTS[name]["address"] for name in SERVERS]
CONFIG = "/etc/consul.d/consul.hcl"


def ask(name: str, path: str) -> Any:  # noqa: ANN401
    return hosts.api(name, knobs.consul_http_port, path)


@pytest.fixture(scope="module")
def settings(host: Host) -> dict[str, Any]:
    """The settings that the agent runs with, defaults included."""
    found: dict[str, Any] = ask(hosts.name_of(host), "/v1/agent/self")["DebugConfig"]
    return found


@pytest.fixture(scope="module")
def members(host: Host) -> list[dict[str, Any]]:
    """All members that this agent knows, gone ones included."""
    found: list[dict[str, Any]] = ask(hosts.name_of(host), "/v1/agent/members")
    return found


def test_runs(host: Host) -> None:
    assert host.service("consul").is_running


def test_starts_at_boot(host: Host) -> None:
    assert host.service("consul").is_enabled


def test_is_not_root(host: Host) -> None:
    assert host.process.get(comm="consul").user == "consul"


def test_user_cannot_log_in(host: Host) -> None:
    assert host.user("consul").shell == "/usr/sbin/nologin"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("KillMode", "process"), ("Restart", "always"), ("NoNewPrivileges", "yes"), ("Type", "notify")],
)
def test_unit(host: Host, setting: str, value: str) -> None:
    assert host.check_output("systemctl show -P %s consul", setting) == value


def test_waits_for_the_private_address(host: Host) -> None:
    assert "private-address.service" in host.check_output("systemctl show -P Requires consul").split()


def test_installed_version_runs(host: Host) -> None:
    binary = f"/usr/local/lib/consul/{hosts.knob('consul_version')}/consul"
    assert host.check_output("readlink /proc/$(systemctl show -P MainPID consul)/exe") == binary


@pytest.mark.parametrize(
    ("path", "mode", "owner"),
    [(CONFIG, 0o640, "consul"), ("/var/lib/consul", 0o750, "consul")],
)
def test_mode_and_owner(host: Host, path: str, mode: int, owner: str) -> None:
    file = host.file(path)
    assert (file.mode, file.user, file.group) == (mode, owner, owner)


@pytest.mark.parametrize("path", [CONFIG, "/var/lib/consul/node-id"])
def test_others_cannot_read(host: Host, path: str) -> None:
    assert host.run("test -e %s && ! runuser -u nobody -- test -r %s", path, path).rc == 0


def test_sees_every_host_alive(members: list[dict[str, Any]]) -> None:
    alive = 1
    assert {member["Name"]: member["Status"] for member in members} == dict.fromkeys(hosts.HOSTS, alive)


def test_sees_the_servers(members: list[dict[str, Any]]) -> None:
    assert {m["Name"] for m in members if m["Tags"]["role"] == "consul"} == set(SERVERS)


def test_is_a_server_in_that_group_only(host: Host, settings: dict[str, Any]) -> None:
    assert settings["ServerMode"] == (hosts.name_of(host) in SERVERS)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("ClientAddrs", [knobs.consul_http_address]),
        ("LeaveOnTerm", False),
        ("SkipLeaveOnInt", True),
        ("RetryJoinLAN", ADDRESSES),
        ("RetryJoinMaxAttemptsLAN", 0),
        ("EnableLocalScriptChecks", False),
        ("EnableRemoteScriptChecks", False),
        ("DisableUpdateCheck", True),
        ("Datacenter", knobs.consul_datacenter),
    ],
)
def test_setting_is_in_effect(settings: dict[str, Any], setting: str, value: object) -> None:
    assert settings[setting] == value


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("BootstrapExpect", len(SERVERS)),
        # Consul's shortest election timeout is 1 s.
        ("ConsulRaftElectionTimeout", f"{hosts.knob('consul_raft_multiplier')}s"),
    ],
)
def test_server_setting_is_in_effect(server: str, setting: str, value: object) -> None:
    assert ask(server, "/v1/agent/self")["DebugConfig"][setting] == value


@pytest.mark.parametrize("server", SERVERS)
def test_server_has_the_ui(server: str) -> None:
    assert "<title>Consul" in ask(server, "/ui/")


def test_all_know_one_leader() -> None:
    leaders = {ask(name, "/v1/status/leader") for name in hosts.HOSTS}
    assert len(leaders & {f"{address}:8300" for address in ADDRESSES}) == len(leaders) == 1


@pytest.fixture(scope="module")
def health() -> dict[str, Any]:
    found: dict[str, Any] = ask(SERVERS[0], "/v1/operator/autopilot/health")
    return found


def test_voters_are_the_servers(health: dict[str, Any]) -> None:
    assert {server["Name"] for server in health["Servers"] if server["Voter"]} == set(SERVERS)


def test_autopilot_is_healthy(health: dict[str, Any]) -> None:
    assert health["Healthy"]


def test_a_server_can_be_spared(health: dict[str, Any]) -> None:
    assert health["FailureTolerance"] == (len(SERVERS) - 1) // 2


def test_autopilot_keeps_the_quorum() -> None:
    assert ask(SERVERS[0], "/v1/operator/autopilot/configuration")["MinQuorum"] == len(SERVERS)


def test_every_check_passes() -> None:
    """Of the hosts and of the services; one that was just restarted may need a moment."""

    def failing() -> list[str]:
        checks = ask(SERVERS[0], "/v1/health/state/any")
        return [f"{check['Node']}: {check['Name']}" for check in checks if check["Status"] != "passing"]

    hosts.wait_for("all checks", lambda: failing() == [], deadline_s=20)
