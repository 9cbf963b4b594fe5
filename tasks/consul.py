"""Consul: a server on each host of group `servers`, a client elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pyinfra import host, inventory
from pyinfra.api import deploy
from pyinfra.api.host import Host

from tasks import artifact, config, rolling
from tasks.cluster import Unavailable, autopilot_fault, behind, consul_api, leader_index

CONFIG = "/etc/consul.d/consul.hcl"
UNIT = "/etc/systemd/system/consul.service"
FILES = [CONFIG, UNIT, "/usr/local/bin/consul"]


@deploy("Consul")
def install() -> None:
    config.create_user(name="Create Consul's user", user="consul")
    artifact.install(name="Install Consul", tool="consul", version=host.data.consul_version)
    text = config.render(
        "consul/consul.hcl.j2",
        is_server="servers" in host.groups,
        servers=[member.data.address for member in inventory.get_group("servers")],
    )
    config.write(
        name="Configure Consul",
        files=[
            config.File(CONFIG, text, mode="640", owner="consul:consul"),
            config.File(UNIT, config.render("consul/consul.service")),
        ],
    )


@deploy("Consul")
def start() -> None:
    """Start what is stopped on all hosts at once: a first start, or a repair. Needs no gate."""
    rolling.start_if_stopped(name="Start Consul where it is stopped", unit="consul", files=FILES)


@deploy("Consul")
def roll() -> None:
    """One host at a time for what runs with an older binary or configuration, the leader last."""
    if not rolling.driver():
        return
    rolling.roll(name="Restart Consul where it is stale, one host at a time", service=SERVICE)
    rolling.wait_until_healthy(
        name="Wait until Consul has a leader", what="a Consul leader", fault=_leaderless
    )
    rolling.change_by_api(
        name="Let Consul's autopilot keep as many servers as there are",
        differs=_other_min_quorum,
        change=_set_min_quorum,
    )


def _other_min_quorum() -> str | None:
    """The configuration file's value is read at the first election only; later ones go by the API."""
    with consul_api(host) as api:
        kept = api.operator.autopilot.configuration()["MinQuorum"]
    return None if kept == len(inventory.get_group("servers")) else f"autopilot keeps {kept} servers"


def _set_min_quorum() -> None:
    with consul_api(host) as api:
        settings = api.operator.autopilot.configuration()
        # The index that was read guards against another writer.
        index = settings.pop("ModifyIndex")
        settings.pop("CreateIndex")
        settings["MinQuorum"] = len(inventory.get_group("servers"))
        api.operator.autopilot.update(settings, cas=index)


def _leaderless() -> str | None:
    with consul_api(host) as api:
        return None if api.status.leader() else "no leader yet"


def autopilot(member: Host) -> dict[str, Any]:
    """GET /v1/operator/autopilot/health. Not python-consul2's own call: it raises on the 429 that an
    unhealthy cluster answers with, and the body is what we want then."""
    with consul_api(member) as api:
        health: dict[str, Any] = api.http.get(
            lambda answer: json.loads(answer.body), path="/v1/operator/autopilot/health"
        )
        return health


def _is_server(member: Host) -> bool:
    return "servers" in member.groups


def _sick(member: Host) -> bool:
    try:
        return bool(autopilot_fault(autopilot(member), member.data.address)) and _is_server(member)
    except (*Unavailable, ValueError):
        return True


def _rank(member: Host) -> int:
    """Clients come after the leader: a newer client may not talk to older servers (since 1.19)."""
    if _sick(member):
        return 0
    if not _is_server(member):
        return 3
    with consul_api(member) as api:
        return 2 if api.status.leader().startswith(f"{member.data.address}:") else 1


def _gate(member: Host) -> str | None:
    if member.data.accept_outage or not _is_server(member) or _sick(member):
        return None
    return autopilot_fault(autopilot(member), need_spare=True) or _unchecked(member)


def _unchecked(member: Host) -> str | None:
    """A run that was interrupted after a restart did not wait for the checks there: they have no output yet."""
    with consul_api(member) as api:
        unchecked = {c["Node"] for c in api.health.state("critical")[1] if not c["Output"]}
    names = ", ".join(m.name for m in rolling.members("") if m.name in unchecked)
    return f"checks have not run yet since Consul's restart on {names}" if names else None


def passing_checks(member: Host) -> dict[str, bool]:
    """Check id -> passes, of all checks on this node, in the catalog and as its agent has it.

    For half a second a restarted agent's checks still pass in the catalog: only the agent knows better.
    """
    with consul_api(member) as api:
        agent = {c["CheckID"]: c["Status"] for c in api.agent.checks().values()}
        catalog = {c["CheckID"]: c["Status"] for c in api.health.node(member.name)[1]}
    return {check: agent.get(check, status) == status == "passing" for check, status in catalog.items()}


def _recovery(member: Host) -> Callable[[], str | None]:
    """The next host waits until this one is a healthy voter, its log has reached what the leader's
    was before the restart, and the checks that passed before pass again: a restarted agent brings
    its checks back as critical, and three quick restarts would empty HAProxy's backends."""
    sick = _sick(member)
    index = 0 if sick or not _is_server(member) else leader_index(autopilot(member))
    passed = set() if sick else {check for check, ok in passing_checks(member).items() if ok}

    def check() -> str | None:
        if _is_server(member):
            health = autopilot(member)
            fault = autopilot_fault(health, member.data.address) or behind(health, member.data.address, index)
            if fault:
                return fault
        failing = [name for name, ok in passing_checks(member).items() if not ok and name in passed]
        return f"checks not passing yet: {', '.join(failing)}" if failing else None

    return check


SERVICE = rolling.Service(unit="consul", files=FILES, rank=_rank, gate=_gate, recovery=_recovery)
