"""Nomad: a client on each worker, which is also a server where it is in group `servers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nomad.api.exceptions import BaseNomadException
from pyinfra import host, inventory
from pyinfra.api import deploy
from pyinfra.api.host import Host

from tasks import artifact, config, rolling
from tasks.cluster import Unavailable, autopilot_fault, behind, leader_index, nomad_api
from tasks.consul import passing_checks

CONFIG = "/etc/nomad.d/nomad.hcl"
UNIT = "/etc/systemd/system/nomad.service"
FILES = [CONFIG, UNIT, "/usr/local/bin/nomad"]


@deploy("Nomad")
def install() -> None:
    artifact.install(name="Install Nomad", tool="nomad", version=host.data.nomad_version)
    text = config.render(
        "nomad/nomad.hcl.j2",
        is_server="servers" in host.groups,
        servers=[member.data.address for member in inventory.get_group("servers")],
    )
    config.write(
        name="Configure Nomad",
        files=[
            config.File(CONFIG, text, mode="600"),
            config.File(UNIT, config.render("nomad/nomad.service")),
        ],
    )


@deploy("Nomad")
def start() -> None:
    """Start what is stopped on all hosts at once: a first start, or a repair. Needs no gate."""
    rolling.start_if_stopped(name="Start Nomad where it is stopped", unit="nomad", files=FILES)


@deploy("Nomad")
def roll() -> None:
    """One host at a time for what runs with an older binary or configuration, the leader last."""
    if host.name != rolling.members("workers")[0].name:
        return
    rolling.wait_until_healthy(
        name="Wait until Nomad has a leader and its clients are ready",
        what="Nomad",
        fault=_not_ready,
    )
    rolling.roll(name="Restart Nomad where it is stale, one host at a time", service=SERVICE)


def _not_ready() -> str | None:
    """A node counts by its name; a node that is down but not in this run is not waited for."""
    with nomad_api(host) as api:
        ready = {node["Name"] for node in api.nodes.get_nodes() if node["Status"] == "ready"}
    missing = [member.name for member in rolling.members("workers") if member.name not in ready]
    return f"clients not ready: {', '.join(missing)}" if missing else None


def autopilot(member: Host) -> dict[str, Any]:
    """GET /v1/operator/autopilot/health, which python-nomad has no call for; 429 = unhealthy."""
    with nomad_api(member) as api:
        try:
            answer = api.operator.request("autopilot", "health", method="get")
        except BaseNomadException as error:
            if getattr(error.nomad_resp, "status_code", 0) != 429:
                raise
            answer = error.nomad_resp
        health: dict[str, Any] = answer.json()
        return health


def _is_server(member: Host) -> bool:
    return "servers" in member.groups


def _sick(member: Host) -> bool:
    try:
        return _is_server(member) and bool(autopilot_fault(autopilot(member), member.data.address))
    except Unavailable:
        return True


def _rank(member: Host) -> int:
    if _sick(member):
        return 0
    with nomad_api(member) as api:
        leader: str = api.status.leader.get_leader()
        return 2 if leader.startswith(f"{member.data.address}:") else 1


def _gate(member: Host) -> str | None:
    if member.data.accept_outage or not _is_server(member) or _sick(member):
        return None
    return autopilot_fault(autopilot(member), need_spare=True)


def node(member: Host) -> dict[str, Any]:
    """The client on `member`, as Nomad's node list gives it; {} if it has never registered."""
    with nomad_api(member) as api:
        mine = [n for n in api.nodes.get_nodes() if n["Name"] == member.name]
        return max(mine, key=lambda n: int(n["Status"] == "ready"), default={})


def _recovery(member: Host) -> Callable[[], str | None]:
    """As for Consul (tasks/consul.py), and the client on this host is ready again."""
    sick = _sick(member)
    index = 0 if sick or not _is_server(member) else leader_index(autopilot(member))
    passed = {check for check, ok in passing_checks(member).items() if ok}

    def check() -> str | None:
        if _is_server(member):
            health = autopilot(member)
            fault = autopilot_fault(health, member.data.address) or behind(health, member.data.address, index)
            if fault:
                return fault
        if node(member).get("Status") != "ready":
            return "its client is not ready yet"
        failing = [name for name, ok in passing_checks(member).items() if not ok and name in passed]
        return f"checks not passing yet: {', '.join(failing)}" if failing else None

    return check


SERVICE = rolling.Service(
    unit="nomad", files=FILES, group="workers", rank=_rank, gate=_gate, recovery=_recovery
)
