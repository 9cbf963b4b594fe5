"""The app: what it answers through HAProxy, and what its containers may do on the workers."""

from __future__ import annotations

import json
import re
import urllib.request
from typing import Any

import pytest
from testinfra.host import Host

from group_data import all as knobs
from tests.lab import hosts

testinfra_hosts = hosts.testinfra("workers")

WORKERS = hosts.names("workers")
COUNT = knobs.app_count if hosts.SCHEDULER == "nomad" else len(WORKERS)
only_with_nomad = pytest.mark.skipif(hosts.SCHEDULER != "nomad", reason="the docker scheduler has no job")
only_with_docker = pytest.mark.skipif(hosts.SCHEDULER != "docker", reason="Nomad runs the containers")


def test_says_hello() -> None:
    assert re.fullmatch(r"Hello from [0-9a-z-]+!", hosts.get("/"))


def test_every_instance_gets_requests() -> None:
    assert len({hosts.get("/") for _ in range(5 * COUNT)}) == COUNT


def test_version_is_the_one_in_consul() -> None:
    instances = hosts.consul_instances()
    assert {name.startswith(f"{knobs.app_name}-{hosts.running_version()}-") for name in instances} == {True}


def test_is_well() -> None:
    assert hosts.get(knobs.app_health_path) == "OK"


@pytest.mark.parametrize("body", [b"", b"\x00\xff\r\n", 100_000 * b"x"], ids=["empty", "binary", "long"])
def test_echoes_what_was_posted(body: bytes) -> None:
    request = urllib.request.Request(f"{hosts.URL}/echo", data=body, method="POST")
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.read() == f"Version: {hosts.running_version()}\n".encode() + body


def test_all_instances_pass_in_consul() -> None:
    assert len(hosts.consul_instances()) == COUNT


@pytest.fixture(scope="module")
def containers(host: Host) -> list[dict[str, Any]]:
    """The running instances on this worker, as Docker describes them."""
    ids = host.check_output("docker ps -q --filter name=%s", f"^{knobs.app_name}-").split()
    if not ids:
        pytest.skip("no instance runs on this worker")
    found: list[dict[str, Any]] = json.loads(host.check_output(f"docker inspect {' '.join(ids)}"))
    return found


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("ReadonlyRootfs", True),
        ("Privileged", False),
        ("CapAdd", None),
        ("SecurityOpt", ["no-new-privileges"]),
        ("PidsLimit", knobs.app_pids_limit),
        ("Memory", knobs.app_memory_mb * 1024 * 1024),
        ("CpuShares", knobs.app_cpu_mhz),
    ],
)
def test_container_is_limited(containers: list[dict[str, Any]], limit: str, value: object) -> None:
    assert [container["HostConfig"][limit] for container in containers] == [value] * len(containers)


def in_each(host: Host, containers: list[dict[str, Any]], command: str) -> set[str]:
    """What `command` prints for the first process of each container; {pid} is its number on the host."""
    return {host.check_output(command.format(pid=container["State"]["Pid"])) for container in containers}


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("Uid", "10001 10001 10001 10001"),
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("NoNewPrivs", "1"),
    ],
)
def test_process_has_no_power(host: Host, containers: list[dict[str, Any]], what: str, value: str) -> None:
    """As the kernel sees it."""
    line = in_each(host, containers, f"grep ^{what}: /proc/{{pid}}/status")
    assert {" ".join(found.split()[1:]) for found in line} == {value}


def test_file_system_is_read_only(host: Host, containers: list[dict[str, Any]]) -> None:
    assert in_each(host, containers, "grep -o ' / / r[ow],' /proc/{pid}/mountinfo") == {" / / ro,"}


def test_image_is_named_by_digest(containers: list[dict[str, Any]]) -> None:
    pattern = rf"127\.0\.0\.1:{knobs.registry_port}/{knobs.app_name}@sha256:[0-9a-f]{{64}}"
    assert all(re.fullmatch(pattern, container["Config"]["Image"]) for container in containers)


def test_all_run_one_image() -> None:
    running = f"docker ps --quiet --filter name=^{knobs.app_name}-"
    images = f"{running} | xargs -r docker inspect --format '{{{{.Config.Image}}}}'"
    found = " ".join(hosts.on_all(WORKERS, images).values()).split()
    assert (len(found), len(set(found))) == (COUNT, 1)


def test_is_on_the_private_address(host: Host, containers: list[dict[str, Any]]) -> None:
    bound = [
        end["HostIp"] for c in containers for ends in c["NetworkSettings"]["Ports"].values() for end in ends
    ]
    assert set(bound) == {hosts.address_of(host)}


@only_with_docker
def test_one_colour_serves(containers: list[dict[str, Any]]) -> None:
    assert len(containers) == 1


@only_with_docker
def test_comes_back_by_itself(containers: list[dict[str, Any]]) -> None:
    assert [c["HostConfig"]["RestartPolicy"]["Name"] for c in containers] == ["unless-stopped"]


@only_with_docker
def test_consul_has_what_runs(host: Host, containers: list[dict[str, Any]]) -> None:
    services = json.loads(host.file("/etc/consul.d/app.json").content_string)["services"]
    assert [service["id"] for service in services] == [c["Name"].lstrip("/") for c in containers]


@only_with_docker
def test_service_file_is_consuls(host: Host) -> None:
    file = host.file("/etc/consul.d/app.json")
    assert (file.mode, file.user, file.group) == (0o600, "consul", "consul")


@pytest.fixture(scope="module")
def group() -> dict[str, Any]:
    """The job's only group, as it runs."""
    (found,) = hosts.api(WORKERS[0], knobs.nomad_http_port, f"/v1/job/{knobs.app_name}")["TaskGroups"]
    return dict(found)


@only_with_nomad
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("Canary", 1),
        ("MaxParallel", 1),
        ("AutoPromote", True),
        ("AutoRevert", True),
        ("HealthCheck", "checks"),
        ("MinHealthyTime", knobs.app_min_healthy_s * 10**9),
        ("HealthyDeadline", knobs.app_healthy_deadline_s * 10**9),
    ],
)
def test_job_is_updated_carefully(group: dict[str, Any], setting: str, value: object) -> None:
    assert group["Update"][setting] == value


@only_with_nomad
def test_instance_serves_on_after_it_left_consul(group: dict[str, Any]) -> None:
    assert group["ShutdownDelay"] == knobs.app_shutdown_delay_s * 10**9


@only_with_nomad
def test_instance_may_finish_its_requests(group: dict[str, Any]) -> None:
    assert group["Tasks"][0]["KillTimeout"] == knobs.app_kill_timeout_s * 10**9
