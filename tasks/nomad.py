"""Nomad: a client on each worker, which is also a server where it is in group `servers`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from nomad.api.exceptions import BaseNomadException
from pyinfra import host, inventory, logger
from pyinfra.api import FunctionCommand, deploy, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State

from tasks import artifact, config, quorum, rolling
from tasks.cluster import Unavailable, nomad_api, wait_until
from tasks.consul import passing_checks, still_failing

CONFIG = "/etc/nomad.d/nomad.hcl"
UNIT = "/etc/systemd/system/nomad.service"
FILES = [CONFIG, UNIT, "/usr/local/bin/nomad"]
JOIN_S = 4.0  # an election takes 1.5 s on the lab, a registration 0.2 s


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
    rolling.roll(name="Restart Nomad where it is stale, one host at a time", service=SERVICE)
    join(name="Wait until Nomad has a leader and its clients are ready")
    rolling.change_by_api(
        name="Let Nomad's autopilot keep as many servers as there are",
        differs=_other_min_quorum,
        change=_set_min_quorum,
    )


def _other_min_quorum() -> str | None:
    """As in tasks/consul.py. python-nomad has no calls for autopilot, so its requester is used."""
    with nomad_api(host) as api:
        kept = api.operator.request("autopilot", "configuration", method="get").json()["MinQuorum"]
    return None if kept == len(inventory.get_group("servers")) else f"autopilot keeps {kept} servers"


def _set_min_quorum() -> None:
    with nomad_api(host) as api:
        settings = api.operator.request("autopilot", "configuration", method="get").json()
        settings["MinQuorum"] = len(inventory.get_group("servers"))
        cas = {"cas": settings["ModifyIndex"]}
        api.operator.request("autopilot", "configuration", method="put", json=settings, params=cas)


@operation()
def join() -> Generator[FunctionCommand]:
    """Wait until the client on each worker of this run is ready; no change when they are."""
    if wait_until("", _not_ready, 0) is None:
        host.noop("all clients are ready")
        return
    yield FunctionCommand(_join, (), {})


def _join(state: State, host: Host) -> bool:
    """A client that registers in the 0.1 s between the first election and the leader's keyring is
    refused, and tries again only after 15 to 30 s (measured; registerRetryIntv in Nomad's client.go).
    It has never registered, so nothing runs on it and a restart costs nothing: that makes it try now.
    """
    early = wait_until("Nomad's clients", _not_ready, JOIN_S, logger.info)
    while early and (refused := _never_registered()):  # asked anew: the others may have got in by themselves
        if not rolling.restart_each(state, host, SERVICE, refused[:1]):
            return False
    deadline_s = float(host.data.roll_deadline_s)
    fault = early and wait_until("Nomad's clients", _not_ready, deadline_s, logger.info)
    if fault:
        logger.error(f"{host.print_prefix}Nomad: {fault}; see journalctl -u nomad there")
    return fault is None


def _not_ready() -> str | None:
    """A node counts by its name; a node that is down but not in this run is not waited for."""
    ready = {node["Name"] for node in _nodes() if node["Status"] == "ready"}
    missing = [member.name for member in rolling.members("workers") if member.name not in ready]
    return f"clients not ready: {', '.join(missing)}" if missing else None


def _never_registered() -> list[Host]:
    try:
        known = {node["Name"] for node in _nodes()}
    except Unavailable:
        return []  # no leader yet: every client waits for one
    return [member for member in rolling.members("workers") if member.name not in known]


def _nodes() -> list[dict[str, Any]]:
    with nomad_api(host) as api:
        nodes: list[dict[str, Any]] = api.nodes.get_nodes()
        return nodes


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


def raft(member: Host) -> dict[str, str]:
    """What the server on `member` itself knows about its log."""
    with nomad_api(member) as api:
        statistics: dict[str, str] = api.agent.get_agent()["stats"]["raft"]
        return statistics


def _leader(member: Host) -> str:
    with nomad_api(member) as api:
        leader: str = api.status.leader.get_leader()
        return leader


QUORUM = quorum.Quorum(autopilot, raft, _leader)


def node(member: Host) -> dict[str, Any]:
    """The client on `member`, as Nomad's node list gives it; {} if it has never registered."""
    with nomad_api(member) as api:
        mine = [n for n in api.nodes.get_nodes() if n["Name"] == member.name]
        return max(mine, key=lambda n: int(n["Status"] == "ready"), default={})


def _recovery(member: Host) -> Callable[[], str | None]:
    """The client on this host is ready again, too, and so are the checks that Nomad has in Consul."""
    caught_up = QUORUM.recovery(member)
    passed = passing_checks(member)

    def check() -> str | None:
        unready = None if node(member).get("Status") == "ready" else "its client is not ready yet"
        return caught_up() or unready or still_failing(member, passed)

    return check


SERVICE = rolling.Service(
    unit="nomad",
    files=FILES,
    group="workers",
    rank=QUORUM.rank,
    gate=QUORUM.gate,
    recovery=_recovery,
)
