"""Nomad on the workers; what only servers have is asked of each server by name."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

from group_data import all as knobs
from lab import settings as lab
from tasks import certificates
from tests.lab import hosts

testinfra_hosts = hosts.testinfra("workers")
pytestmark = pytest.mark.skipif(hosts.SCHEDULER != "nomad", reason="the docker scheduler does without Nomad")

SERVERS = hosts.names("servers")
WORKERS = hosts.names("workers")
CONFIG = "/etc/nomad.d/nomad.hcl"


secure_only = pytest.mark.skipif(not hosts.knob("secure"), reason="secure = False: nothing is refused")


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


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        (CONFIG, 0o600),
        ("/var/lib/nomad", 0o700),
        *([("/etc/nomad.d/nomad.key", 0o600)] if hosts.knob("secure") else []),
    ],
)
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


def test_containers_have_a_limit_of_processes(docker_plugin: dict[str, Any]) -> None:
    assert docker_plugin["pids_limit"] == knobs.nomad_pids_limit


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


# Who may do what


APP, REGISTRY = f"/v1/job/{knobs.app_name}", "/v1/job/registry?namespace=platform"
VARIABLE = f"/v1/var/nomad/jobs/{knobs.app_name}"


@secure_only
@pytest.mark.parametrize(
    ("token", "method", "path", "allowed"),
    [
        ("", "GET", "/v1/status/leader", True),
        ("", "GET", "/v1/jobs", False),
        ("", "GET", "/v1/nodes", False),
        ("", "GET", "/v1/agent/self", False),
        ("status", "GET", APP, True),
        ("status", "GET", "/v1/nodes", True),
        ("status", "GET", "/v1/operator/autopilot/health", True),
        ("status", "DELETE", APP, False),
        ("status", "GET", VARIABLE, False),
        ("status", "PUT", "/v1/operator/autopilot/configuration", False),
        ("release", "GET", APP, True),
        ("release", "GET", "/v1/nodes", True),
        ("release", "GET", REGISTRY, False),
        ("release", "DELETE", REGISTRY, False),
        ("release", "GET", "/v1/var/nomad/jobs/another", False),
        ("release", "GET", "/v1/agent/self", False),
        ("release", "GET", "/v1/agent/keyring/list", False),
        ("release", "GET", "/v1/operator/autopilot/health", False),
        ("release", "PUT", "/v1/system/gc", False),
        ("release", "GET", "/v1/acl/tokens", False),
        ("operator", "GET", REGISTRY, True),
        ("operator", "GET", "/v1/agent/self", True),
        ("operator", "GET", VARIABLE, False),
        ("operator", "GET", "/v1/agent/keyring/list", False),
        ("operator", "GET", "/v1/acl/tokens", False),
        ("operator", "PUT", "/v1/acl/bootstrap", False),
    ],
)
def test_token(token: str, method: str, path: str, allowed: bool) -> None:
    status = hosts.nomad(SERVERS[0], method, path, token=token).split()[1]
    assert (status == "200") is allowed, status
    assert allowed or status in ("400", "403")  # 400: what is bootstrapped already


def job(name: str, groups: dict[str, dict[str, Any]], **more: object) -> str:
    """A batch job, as the API takes it, of containers that fail once and for all. groups: name -> config."""
    return json.dumps(
        {
            "Job": {
                "ID": name,
                "Type": "batch",
                "Datacenters": ["*"],
                "TaskGroups": [
                    {
                        "Name": group,
                        "RestartPolicy": {"Attempts": 0, "Mode": "fail"},
                        "ReschedulePolicy": {"Attempts": 0, "Unlimited": False},
                        "Tasks": [
                            {
                                "Name": group,
                                "Driver": "docker",
                                "Config": {"image": knobs.registry_image} | config,
                                "Resources": {"CPU": 10, "MemoryMB": 16},
                            }
                        ],
                        **more,
                    }
                    for group, config in groups.items()
                ],
            }
        }
    )


@secure_only
def test_release_token_registers_nothing_among_the_platform() -> None:
    body = job("stranger", {"one": {}}).replace('"ID"', '"Namespace": "platform", "ID"')
    answer = hosts.nomad(SERVERS[0], "PUT", "/v1/jobs", body, token="release")
    assert answer.split()[1] == "403", answer


@secure_only
def test_release_token_gets_no_volume_of_a_host() -> None:
    volumes = {"v": {"Name": "v", "Type": "host", "Source": "registry"}}
    body = job("stranger", {"one": {}}, Volumes=volumes)
    answer = hosts.nomad(SERVERS[0], "PUT", "/v1/jobs", body, token="release")
    assert answer.split()[1] == "403", answer


POWERS: dict[str, tuple[dict[str, Any], str]] = {
    "privileged": ({"privileged": True}, "privileged mode is disabled"),
    "folder": ({"volumes": ["/etc:/host"]}, "volumes are not enabled"),
    "socket": ({"volumes": ["/var/run/docker.sock:/s"]}, "volumes are not enabled"),
    "mount": ({"mount": [{"type": "bind", "source": "/etc", "target": "/h"}]}, "volumes are not enabled"),
    "pid": ({"pid_mode": "host"}, 'cannot apply "pid_mode"'),
    "ipc": ({"ipc_mode": "host"}, 'cannot apply "ipc_mode"'),
    "uts": ({"uts_mode": "host"}, 'cannot apply "uts_mode"'),
    "userns": ({"userns_mode": "host"}, 'cannot apply "userns_mode"'),
    "capability": ({"cap_add": ["sys_admin"]}, "does not allow the following capabilities: sys_admin"),
}


@pytest.fixture(scope="module")
def refusals() -> Iterator[dict[str, str]]:
    """What became of a container that asks for one of POWERS: its name -> its events."""
    where, name = SERVERS[0], "powers"
    token = "release" if hosts.knob("secure") else ""
    body = job(name, {power: config for power, (config, _) in POWERS.items()})

    def ended() -> dict[str, str] | None:
        found = ask(where, f"/v1/job/{name}/allocations")
        done = {a["TaskGroup"]: json.dumps(a["TaskStates"]) for a in found if a["ClientStatus"] == "failed"}
        return done if done.keys() == POWERS.keys() else None

    assert hosts.nomad(where, "PUT", "/v1/jobs", body, token=token).split()[1] == "200"
    try:
        yield hosts.wait_for("the containers to be refused", ended)
    finally:
        hosts.nomad(where, "DELETE", f"/v1/job/{name}?purge=true", token=token)


@pytest.mark.parametrize("power", POWERS)
def test_a_container_is_refused_power_over_its_host(refusals: dict[str, str], power: str) -> None:
    assert POWERS[power][1] in json.loads(json.dumps(refusals[power]).replace("\\\\", ""))


# Who may talk to the agents


@secure_only
def test_without_a_certificate_nobody_is_heard(host: Host) -> None:
    bare = re.sub(r" -cert \S+ -key \S+", "", hosts.NOMAD_TLS)
    request = r"printf 'GET /v1/status/leader HTTP/1.0\r\n\r\n'"
    answer = hosts.on(hosts.name_of(host), f"{request} | {bare} 2>&1", check=False)
    assert "200 OK" not in answer
    assert "certificate required" in answer


@secure_only
@pytest.mark.parametrize(("kind", "heard"), [("server", True), ("client", False)])
def test_only_a_server_may_replicate(kind: str, heard: bool, tmp_path: Path) -> None:
    """A client's certificate, as a stolen worker has it, opens no connection of those among servers."""
    for name in ("ca.pem", "ca.key"):
        shutil.copy(lab.SECRETS / name, tmp_path / name)
    profile = certificates.Profile((f"{kind}.{knobs.nomad_region}.nomad",))
    certificates.issued(tmp_path, kind, profile)
    with raft(SERVERS[-1], tmp_path / kind) as connection:
        try:
            closed = connection.recv(1) == b""
        except TimeoutError:  # it waits for what we have to say
            closed = False
    assert closed is not heard


@contextmanager
def raft(server: str, pair: Path) -> Iterator[ssl.SSLSocket]:
    """A connection to Nomad's RPC port as a server opens it to another, over SSH."""
    ours, theirs = socket.socketpair()
    way = ["ssh", "-F", str(hosts.SSH_CONFIG), "-W", f"{hosts.HOSTS[server]['address']}:4647", server]
    trust = ssl.create_default_context(cafile=lab.SECRETS / "ca.pem")
    trust.load_cert_chain(f"{pair}.pem", f"{pair}.key")
    with ours, theirs, subprocess.Popen(way, stdin=theirs.fileno(), stdout=theirs.fileno()) as tunnel:
        theirs.close()
        ours.settimeout(3)
        ours.sendall(b"\x04")  # Nomad's byte for TLS
        with trust.wrap_socket(ours, server_hostname=f"server.{knobs.nomad_region}.nomad") as inside:
            inside.sendall(b"\x02")  # and for Raft
            yield inside
        tunnel.kill()


STRANGER = """
server {{
  enabled          = true
  bootstrap_expect = 3
  encrypt          = "{key}"
  server_join {{
    retry_join = ["{address}:4648"]
  }}
}}
bind_addr = "{address}"
addresses {{
  http = "127.0.0.1"
}}
data_dir             = "/run/stranger/data"
disable_update_check = true
consul {{
  auto_advertise   = false
  server_auto_join = false
}}
advertise {{
  http = "{address}"
}}
ports {{
  http = 5646
  rpc  = 5647
  serf = 5648
}}
"""


@secure_only
def test_gossip_with_another_key_is_not_understood() -> None:
    where = SERVERS[0]
    key = base64.b64encode(bytes(32)).decode()
    text = STRANGER.format(key=key, address=hosts.HOSTS[where]["address"])
    log = hosts.on(
        where,
        "mkdir -p /run/stranger && cd /run/stranger && trap 'kill $agent; rm -rf /run/stranger' EXIT\n"
        f"cat > nomad.hcl <<'EOF'\n{text}\nEOF\n"
        "nomad agent -config nomad.hcl > log 2>&1 & agent=$!\n"
        "for i in $(seq 100); do grep -q decrypt log && break; sleep 0.1; done; cat log",
    )
    assert "no installed keys could decrypt the message" in log, log
    members = {member["Name"] for member in ask(where, "/v1/agent/members")["Members"]}
    assert members == {f"{name}.{knobs.nomad_region}" for name in SERVERS}
