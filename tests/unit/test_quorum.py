"""Whether a server may be stopped, and when it is back, on what real servers of Consul 1.14.11 and of
Nomad 2.0.5 answered (see recorded/; worker-03 was killed in "one-dead")."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pyinfra.api.host import Host

from tasks import quorum, rolling

RECORDED = Path(__file__).parent / "recorded"
NETWORK = {"consul": "127.0.2.", "nomad": "127.0.1."}
WELL = {"state": "Follower", "applied_index": "31", "last_log_index": "31"}
STARTING = WELL | {"applied_index": "0"}  # what Nomad says in its first 0.1 s
SEARCHING = WELL | {"state": "Candidate"}
NEW = {"state": "Follower", "applied_index": "0", "last_log_index": "0"}

tools = pytest.mark.parametrize("tool", NETWORK)


def recorded(name: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((RECORDED / f"autopilot-{name}.json").read_text())
    return answer


def member(n: int, network: str) -> Host:
    data = SimpleNamespace(address=f"{network}1{n}", accept_outage=False)
    return cast(Host, SimpleNamespace(name=f"worker-0{n}", groups=["servers", "workers"], data=data))


class Cluster:
    """Three servers. Autopilot says what was recorded; each says about itself what `raft` has for it."""

    def __init__(self, tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tool, self.health = tool, "healthy"
        self.members = [member(n, NETWORK[tool]) for n in (1, 2, 3)]
        self.raft: dict[str, dict[str, str] | Exception] = {m.name: WELL for m in self.members}
        self.quorum = quorum.Quorum(self._autopilot, self._raft, lambda member: f"{NETWORK[tool]}12:8300")
        everybody = list(self.members)  # some of them may not be in this run
        monkeypatch.setattr(rolling, "members", lambda group: self.members)
        monkeypatch.setattr(quorum, "inventory", SimpleNamespace(get_group=lambda group: everybody))

    def _autopilot(self, member: Host) -> dict[str, Any]:
        if isinstance(self.raft[member.name], Exception) or self.health == "none":
            raise ConnectionRefusedError("refused")
        # Consul answers with status 500 while its leader is new.
        return recorded(f"{'nomad' if self.health == 'new-leader' else self.tool}-{self.health}")

    def _raft(self, member: Host) -> dict[str, str]:
        answer = self.raft[member.name]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def gate(self, n: int) -> str | None:
        return self.quorum.gate(self.members[n - 1])


@pytest.fixture(params=NETWORK)
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(request.param, monkeypatch)


def test_one_of_three_healthy_ones_may_be_stopped(cluster: Cluster) -> None:
    assert cluster.gate(1) is None


def test_of_two_none_may_and_waiting_is_of_no_use(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quorum, "inventory", SimpleNamespace(get_group=lambda group: cluster.members[:2]))
    with pytest.raises(rolling.NeverOpens):
        cluster.gate(1)
    cluster.members[0].data.accept_outage = True
    assert cluster.gate(1) is None


def test_beside_a_dead_one_no_healthy_one_may(cluster: Cluster) -> None:
    cluster.health = "one-dead"
    cluster.members.pop()  # not part of this run, and autopilot's word is enough
    assert (cluster.gate(1) or "").startswith("unhealthy servers: worker-03")
    assert (cluster.gate(2) or "").startswith("unhealthy servers: worker-03")


@pytest.mark.parametrize("raft", [STARTING, SEARCHING, ConnectionRefusedError("refused")])
def test_the_sick_one_itself_needs_no_gate(cluster: Cluster, raft: dict[str, str] | Exception) -> None:
    cluster.health = "one-dead"
    cluster.raft["worker-03"] = raft
    assert cluster.gate(3) is None


def test_one_that_is_only_called_unhealthy_does(cluster: Cluster) -> None:
    """A new leader calls the others unhealthy at first, while they follow it."""
    cluster.health = "one-dead"
    assert cluster.gate(3) is not None


@pytest.mark.parametrize("health", ["new-leader", "none"])
def test_without_a_leaders_view_nobody_is_called_sick(cluster: Cluster, health: str) -> None:
    cluster.health = health
    assert cluster.gate(1) == "no leader that knows the servers yet"


def test_a_client_is_no_sick_server(cluster: Cluster) -> None:
    """Autopilot does not know it, and it has no log to ask for."""
    client = member(4, NETWORK[cluster.tool])
    client.groups.remove("servers")
    cluster.raft["worker-04"] = KeyError("raft")
    assert not cluster.quorum.sick(client)


@pytest.mark.parametrize("raft", [STARTING, SEARCHING])
def test_autopilots_old_view_opens_no_gate(cluster: Cluster, raft: dict[str, str]) -> None:
    cluster.raft["worker-03"] = raft
    assert cluster.gate(1) == "not caught up: worker-03"


def test_a_server_that_does_not_answer_opens_no_gate(cluster: Cluster) -> None:
    cluster.raft["worker-03"] = ConnectionRefusedError("refused")
    assert cluster.gate(1) == "not caught up: worker-03"


def test_one_outside_the_run_that_was_just_stopped_opens_no_gate(cluster: Cluster) -> None:
    """Autopilot does not know it yet."""
    cluster.raft[cluster.members.pop().name] = ConnectionRefusedError("refused")
    assert cluster.gate(1) == "not caught up: worker-03"


def test_an_accepted_outage_opens_it(cluster: Cluster) -> None:
    cluster.health = "none"
    cluster.members[0].data.accept_outage = True
    assert cluster.gate(1) is None


def test_a_cluster_that_never_had_a_leader_needs_no_gate_and_no_wait(cluster: Cluster) -> None:
    cluster.health = "none"
    cluster.raft = dict.fromkeys(cluster.raft, NEW)
    assert cluster.gate(1) is None
    assert cluster.quorum.recovery(cluster.members[0])() is None


def test_a_restarted_server_is_back_when_it_has_found_its_leader(cluster: Cluster) -> None:
    """Autopilot calls it healthy and up to date all the time: that is from before the restart."""
    recovered = cluster.quorum.recovery(cluster.members[0])
    index = {"consul": 25, "nomad": 7}[cluster.tool]
    cluster.raft["worker-01"] = STARTING
    assert recovered() == f"its log is at 0, not yet at {index}"
    cluster.raft["worker-01"] = WELL | {"applied_index": str(index)}
    assert recovered() is None


def test_the_sick_come_first_and_the_leader_after_its_followers(cluster: Cluster) -> None:
    cluster.health = "one-dead"
    cluster.raft["worker-03"] = SEARCHING
    client = member(4, NETWORK[cluster.tool])
    client.groups.remove("servers")
    cluster.members.append(client)
    order = sorted(cluster.members, key=cluster.quorum.rank)
    assert [m.name for m in order] == ["worker-03", "worker-01", "worker-02", "worker-04"]


# Autopilot's answers


@tools
def test_a_healthy_cluster_can_spare_one(tool: str) -> None:
    assert quorum.autopilot_fault(recorded(f"{tool}-healthy"), need_spare=True) is None


@tools
def test_the_sick_one_is_named_and_none_can_be_spared(tool: str) -> None:
    fault = quorum.autopilot_fault(recorded(f"{tool}-one-dead"), need_spare=True)
    assert fault is not None
    assert fault.startswith("unhealthy servers: worker-03")


@tools
@pytest.mark.parametrize(("last", "well"), [("11", True), ("12", True), ("13", False), ("99", False)])
def test_a_server_is_judged_by_itself(tool: str, last: str, well: bool) -> None:
    """Else every healthy server looked sick beside a sick one, and would be restarted without a gate."""
    fault = quorum.autopilot_fault(recorded(f"{tool}-one-dead"), NETWORK[tool] + last)
    assert fault == (None if well else "this server is not yet a healthy voter")


@tools
def test_a_server_without_a_vote_is_not_well(tool: str) -> None:
    health = recorded(f"{tool}-healthy")
    for server in health["Servers"]:
        server["Voter"] = False
    assert quorum.autopilot_fault(health, NETWORK[tool] + "11") is not None


def test_two_healthy_servers_cannot_spare_one() -> None:
    health = {**recorded("consul-healthy"), "FailureTolerance": 0}
    assert quorum.autopilot_fault(health) is None
    assert quorum.autopilot_fault(health, need_spare=True) == "no server can be spared (failure tolerance 0)"


def test_a_new_leader_that_knows_nobody_yet_is_a_fault() -> None:
    health = recorded("nomad-new-leader")
    assert quorum.autopilot_fault(health) == "unhealthy servers: no leader"
    assert quorum.autopilot_fault(health, "127.0.1.11") == "this server is not yet a healthy voter"
    assert quorum.leader_index({"Servers": []}) == 1


def test_a_client_is_never_a_sick_server(cluster: Cluster) -> None:
    client = member(9, "127.0.9.")
    client.groups.remove("servers")
    cluster.raft[client.name] = KeyError("raft")  # a client has no log to tell of
    assert not cluster.quorum.sick(client)
