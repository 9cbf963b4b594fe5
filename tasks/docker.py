"""Docker on the workers, restarted one host at a time with its apps moved away first."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Generator

from pyinfra import host, logger
from pyinfra.api import FunctionCommand, deploy, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.facts.files import File

from tasks import cluster, config, containers, rolling, shell
from tasks.nomad import node

CONFIG = "/etc/docker/daemon.json"
DRAINED = "/var/lib/nomad/drained-for-docker"


@deploy("Docker")
def configure() -> None:
    """Before the package: the first start of the engine must already be with our settings."""
    config.write(name="Configure Docker", files=[config.File(CONFIG, daemon_json())])
    if host.data.scheduler == "docker":
        containers.configure()


def daemon_json() -> str:
    """The engine's settings; containers ask the host's resolver, which knows *.consul."""
    data = host.data
    settings = {
        "live-restore": True,
        "bip": data.docker_bip,
        "default-address-pools": [{"base": data.docker_address_pool, "size": 24}],
        "dns": [str(ipaddress.ip_interface(data.docker_bip).ip)],
        "log-driver": "json-file",
        "log-opts": {
            "max-size": data.docker_log_max_size,
            "max-file": str(data.docker_log_max_file),
        },
    }
    return json.dumps(settings, indent=2) + "\n"


@deploy("Docker")
def start() -> None:
    rolling.start_if_stopped(name="Start Docker where it is stopped", unit="docker", files=[CONFIG])


@deploy("Docker")
def roll() -> None:
    """One host at a time, and whatever an interrupted run has sent away comes back first."""
    if host.data.scheduler == "nomad":
        take_back_if_drained(name="Let Nomad use this worker again where a run was interrupted")
    else:
        containers.resume_if_paused(name="Serve again where a run was interrupted")
    if rolling.leads("workers"):
        rolling.roll(name="Restart Docker where it is stale, one host at a time", service=SERVICE)


def _rank(member: Host) -> int:
    return 1


def _gate(member: Host) -> str | None:
    """Another worker must be there to serve meanwhile."""
    if member.data.accept_outage:
        return None
    if member.data.scheduler == "docker":
        return containers.spare(member)
    return None if _eligible_nodes(member) - {member.name} else "no other worker can serve meanwhile"


def _eligible_nodes(member: Host) -> set[str]:
    with cluster.nomad_api(member) as api:
        return {
            n["Name"]
            for n in api.nodes.get_nodes()
            if n["Status"] == "ready" and n["SchedulingEligibility"] == "eligible"
        }


def _restart(member: Host, unit: str) -> str | None:
    """The instances leave beforehand, in the order that drops no request. Live-restore would keep the
    containers, but Nomad replaces their allocations all the same (nomad#24105)."""
    if member.data.scheduler == "nomad":
        return _drain(member) or rolling.run(member, unit)
    return containers.pause(member) or rolling.run(member, unit) or containers.resume(member)


def _drain(member: Host) -> str | None:
    """The mark on disk tells the next run, should this one be interrupted, that the drain is ours."""
    node_id = node(member).get("ID")
    if not node_id:
        return None
    unmarked = shell.fault(member, f"touch {DRAINED}")
    if unmarked:
        return unmarked
    with cluster.nomad_api(member) as api:
        # The registry leaves, too: so its check cannot pass on until Nomad notices that it was cut off.
        spec = {"Deadline": int(member.data.roll_deadline_s * 1e9), "IgnoreSystemJobs": False}
        api.node.drain_node_with_spec(node_id, spec, mark_eligible=False)

        def draining() -> str | None:
            return "instances are leaving" if api.node.get_node(node_id)["DrainStrategy"] else None

        def say(line: str) -> None:
            logger.info(f"{member.print_prefix}{line}")

        return cluster.wait_until("the drain", draining, member.data.roll_deadline_s, say)


def _recovery(member: Host) -> Callable[[], str | None]:
    """What else ran in its containers, such as the registry, is back too."""
    before = _other_services(member)

    def check() -> str | None:
        fault = _take_back(member) if member.data.scheduler == "nomad" else None
        missing = ", ".join(sorted(before - _other_services(member)))
        return fault or (f"not passing yet: {missing}" if missing else None)

    return check


def _other_services(member: Host) -> set[str]:
    """The services whose checks pass on this worker, without the app: its instances have moved."""
    with cluster.consul_api(member) as api:
        passing = {c["ServiceName"] for c in api.health.node(member.name)[1] if c["Status"] == "passing"}
    return passing - {member.data.app_name}


def _take_back(member: Host) -> str | None:
    """Let Nomad place instances here again, once it sees a healthy Docker."""
    mine = node(member)
    if mine.get("Status") != "ready" or not mine.get("Drivers", {}).get("docker", {}).get("Healthy"):
        return "Nomad does not see a healthy Docker yet"
    with cluster.nomad_api(member) as api:
        # Not eligible_node(): that leaves a drain under way in place, which this ends.
        api.node.drain_node_with_spec(mine["ID"], None, mark_eligible=True)
    return shell.fault(member, f"rm -f {DRAINED}")


@operation()
def take_back_if_drained() -> Generator[FunctionCommand]:
    """End a drain of ours that an interrupted run has left behind; an operator's own is not touched."""
    if not host.get_fact(File, path=DRAINED):
        host.noop("no drain of ours is left")
        return
    yield FunctionCommand(_end_drain, (), {})


def _end_drain(state: State, host: Host) -> bool:
    fault = cluster.wait_until("Nomad's client", lambda: _take_back(host), host.data.roll_deadline_s)
    if fault:
        logger.error(f"{host.print_prefix}{fault}; see journalctl -u nomad -u docker there")
    return fault is None


SERVICE = rolling.Service(
    unit="docker",
    files=[CONFIG],
    group="workers",
    rank=_rank,
    gate=_gate,
    restart=_restart,
    recovery=_recovery,
)
