"""May a server be stopped, and is it back? Consul and Nomad answer both questions in one shape.

Autopilot's view alone will not do (all measured). A killed server stays healthy there for 8 s with
Consul and 40 s with Nomad; a restarted one is healthy and up to date before it has found its leader;
and a new leader lists nobody at first, or calls the others unhealthy for two seconds. So each server
is also asked about its own log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyinfra import inventory
from pyinfra.api.host import Host

from tasks import rolling
from tasks.cluster import Unavailable

Health = dict[str, Any]  # GET /v1/operator/autopilot/health
Raft = dict[str, str]  # the "raft" statistics of an agent


@dataclass(frozen=True)
class Quorum:
    """The servers of one kind, as these three calls on any of them tell."""

    autopilot: Callable[[Host], Health]
    raft: Callable[[Host], Raft]
    leader: Callable[[Host], str]  # its address:port

    def rank(self, member: Host) -> int:
        """The sick first (0), followers, the leader, clients last: a newer client may not talk to
        older servers."""
        if not is_server(member):
            return 3
        if self.sick(member):
            return 0
        return 2 if self.leader(member).startswith(f"{member.data.address}:") else 1

    def sick(self, member: Host) -> bool:
        """The cluster knows it as missing or unhealthy, and it is itself not in touch with a leader."""
        if not is_server(member):
            return False
        health = self.health()
        if health is None or autopilot_fault(health, member.data.address) is None:
            return False
        return not self._follows(member)

    def gate(self, member: Host) -> str | None:
        """Why the cluster cannot do without it, or None. Repair is never blocked: of the sick one, or
        of a cluster that never had a leader."""
        if member.data.accept_outage or not is_server(member):
            return None
        health = self.health()
        if health is None:
            never_led = self.raft(member)["last_log_index"] == "0"
            return None if never_led else "no leader that knows the servers yet"
        if self.sick(member):
            return None
        servers = inventory.get_group("servers")
        if len(servers) < 3:
            raise rolling.NeverOpens("with fewer than 3 servers none can be spared")
        # Those outside this run are asked as well, over a connection of their own.
        behind = [other.name for other in servers if not self._follows(other)]
        return f"not caught up: {', '.join(behind)}" if behind else autopilot_fault(health, need_spare=True)

    def _follows(self, member: Host) -> bool:
        try:
            return applied(self.raft(member)) > 0
        except Unavailable:
            return False

    def recovery(self, member: Host) -> Callable[[], str | None]:
        """Called before a restart, asked after it: a healthy voter again, whose log has reached what the
        leader's was. Without a leader before, there is nothing to wait for."""
        health = self.health()
        if health is None or not is_server(member):
            return lambda: None
        index = leader_index(health)

        def check() -> str | None:
            if (reached := applied(self.raft(member))) < index:
                return f"its log is at {reached}, not yet at {index}"
            return autopilot_fault(self.autopilot(member), member.data.address)

        return check

    def health(self) -> Health | None:
        """The first answer that knows the servers; None while there is no leader, or a new one knows
        nobody yet: such an answer says nothing about anybody's health."""
        for server in rolling.members("servers"):
            try:
                health = self.autopilot(server)
            except Unavailable:
                continue
            if health["Servers"]:
                return health
        return None


def is_server(member: Host) -> bool:
    return "servers" in member.groups


def autopilot_fault(health: Health, address: str = "", need_spare: bool = False) -> str | None:
    """What is wrong in an autopilot health answer, or None.

    With `address`, only that server is judged: whether it is a healthy voter. With `need_spare`, the
    cluster must be able to lose one more server.
    """
    servers = health["Servers"] or []
    if address:
        mine = [s for s in servers if s["Address"].split(":")[0] == address]
        well = mine and mine[0]["Healthy"] and mine[0]["Voter"]
        return None if well else "this server is not yet a healthy voter"
    if not health["Healthy"]:
        sick = [s["Name"] for s in servers if not s["Healthy"]]
        return f"unhealthy servers: {', '.join(sick) or 'no leader'}"
    if need_spare and health["FailureTolerance"] < 1:
        return "no server can be spared (failure tolerance 0)"
    return None


def leader_index(health: Health) -> int:
    """The leader's last log index; 1 without a leader."""
    return max((s["LastIndex"] for s in health["Servers"] if s["Leader"]), default=1)


def applied(raft: Raft) -> int:
    """The index up to which a server has applied its log; 0 = not in touch with a leader since its start."""
    return int(raft["applied_index"]) if raft["state"] in ("Leader", "Follower") else 0
