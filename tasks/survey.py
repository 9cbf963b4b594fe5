"""What the cluster says about itself, asked from the controller, all hosts at once. Reads only.

A part that cannot be had is None or {"fault": "..."}, never an exception: status.py must show a sick cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import gevent  # type: ignore[import-untyped]
from pyinfra import state
from pyinfra.api.host import Host

from tasks import (
    artifact,
    certificates,
    consul,
    containers,
    distribute,
    haproxy,
    held,
    history,
    keepalived,
    lock,
    nomad,
    nomad_job,
    registry_access,
    serving,
    shell,
    vip,
)
from tasks.cluster import Unavailable, consul_api, nomad_api

Found = dict[str, Any]
Answer = TypeVar("Answer")
# Whose certificate -> where it lies on a host that has it.
CERTIFICATES = {
    "CA": certificates.CA_FILE,
    "consul": consul.CERTIFICATE,
    "nomad": nomad.CERT,
    "registry": registry_access.CERTIFICATE,
    "haproxy": haproxy.CERTIFICATE,
}
SILENT_S = 5  # a host that takes longer to answer counts as silent
_LOST = (*Unavailable, containers.Failed, containers.Lost, EOFError, ValueError, gevent.Timeout)


def survey() -> Found:
    """Everything, as JSON would have it; tasks/report.py judges and prints it."""
    members = sorted({*state.activated_hosts, *state.failed_hosts}, key=lambda m: m.name)
    reached = sorted(state.active_hosts, key=lambda m: ("servers" not in m.groups, m.name))
    workers = [m for m in reached if "workers" in m.groups]
    proxies = [m for m in reached if "proxies" in m.groups]
    by_nomad = any(m.data.scheduler == "nomad" for m in members)
    jobs = {
        "hosts": gevent.spawn(_each, members, _host),
        "consul": gevent.spawn(_first, reached, _consul),
        "nomad": gevent.spawn(_first, workers, _nomad) if by_nomad else None,
        "app": gevent.spawn(_first, reached, _app),
        "proxies": gevent.spawn(_each, proxies, _proxy),
        "registries": gevent.spawn(_each, workers, _registry),
        "releases": gevent.spawn(_first, reached, _releases),
    }
    gevent.joinall([job for job in jobs.values() if job is not None], raise_error=True)
    return {name: None if job is None else job.value for name, job in jobs.items()}


def _each(members: list[Host], ask: Callable[[Host], Found]) -> dict[str, Found]:
    """Host -> its answer, all asked at once."""
    jobs = {member.name: gevent.spawn(_patiently, member, ask) for member in members}
    gevent.joinall(jobs.values(), raise_error=True)
    return {name: job.value for name, job in jobs.items()}


def _patiently(member: Host, ask: Callable[[Host], Found]) -> Found:
    try:
        with gevent.Timeout(SILENT_S):
            return ask(member)
    except _LOST as error:
        silent = f"no answer in {SILENT_S} s" if isinstance(error, gevent.Timeout) else None
        return {"fault": silent or distribute.said(error)}


def _first(members: list[Host], ask: Callable[[Host], Found]) -> Found:
    """The first answer without a fault: one agent speaks for its cluster."""
    answer: Found = {"fault": "no host to ask"}
    for member in members:
        answer = _patiently(member, ask)
        if "fault" not in answer:
            break
    return answer


def _host(member: Host) -> Found:
    """Its place in the inventory, its tools, the app's images in its Docker, and (docker scheduler) the
    versions of its containers, stopped ones included, the newest first."""
    found: Found = {
        "address": member.data.address,
        "groups": [g for g in ("servers", "workers", "proxies", "builder") if g in member.groups],
        "reached": member in state.active_hosts,
    }
    if found["reached"]:
        fact = artifact.Tools()
        _, output = shell.run(member, fact.command())
        found["tools"] = {
            tool: {
                "running": now.running,
                "installed": now.installed,
                "unsigned": now.installed in now.unsigned,
            }
            for tool, now in fact.process(output.stdout_lines).items()
            if now.installed
        }
        found["certificates"] = _certificates(member)
    if found["reached"] and "workers" in member.groups:
        found["images"] = {version: image.digest for version, image in held.images(member).items()}
        if member.data.scheduler == "docker":
            newest = sorted(containers.instances(member), key=lambda i: i.created, reverse=True)
            found["containers"] = [instance.version for instance in newest]
    return found


def _certificates(member: Host) -> Found | None:
    """Whose certificate -> whole days that it has left; None without security."""
    if not member.data.secure:
        return None
    # What is before a certificate may be its key.
    show = "test ! -f $f || { echo file $f; sed -n '/BEGIN CERT/,/END CERT/p' $f; }"
    _, output = shell.run(member, f"for f in {' '.join(CERTIFICATES.values())}; do {show}; done")
    files = dict(part.split("\n", 1) for part in output.stdout.split("file ") if "BEGIN" in part)
    return {
        whose: certificates.days_left(files[path]) for whose, path in CERTIFICATES.items() if path in files
    }


def _consul(member: Host) -> Found:
    with consul_api(member) as api:
        leader = api.status.leader()
        members = {m["Name"]: m["Status"] == 1 for m in api.agent.members()}
    return {"leader": leader.split(":")[0], "members": members, "servers": _servers(consul.autopilot(member))}


def _nomad(member: Host) -> Found:
    stable = nomad_job.stable_versions(member)
    with nomad_api(member) as api:
        leader = api.status.leader.get_leader()
        nodes = {
            n["Name"]: _node(n) for n in sorted(api.nodes.get_nodes(), key=lambda n: n["Status"] == "ready")
        }
    servers = _servers(nomad.autopilot(member))
    return {"leader": leader.split(":")[0], "nodes": nodes, "servers": servers, "stable": stable}


def _servers(health: Found) -> Found:
    """Address -> healthy voter."""
    return {s["Address"].split(":")[0]: s["Healthy"] and s["Voter"] for s in health["Servers"] or []}


def _node(node: Found) -> str:
    """ready, down ..., or why Nomad places nothing there."""
    if node["Status"] != "ready":
        return str(node["Status"])
    if node["Drain"]:
        return "draining"
    return "ready" if node["SchedulingEligibility"] == "eligible" else "ineligible"


def _app(member: Host) -> Found:
    """wanted: how many instances there should be; None: one on each worker."""
    data = member.data
    with consul_api(member) as api:
        entries = api.health.service(data.app_name)[1]
    instances = [_instance(entry) for entry in entries]
    wanted = data.app_count if data.scheduler == "nomad" else None
    return {"name": data.app_name, "wanted": wanted, "instances": sorted(instances, key=lambda i: i["node"])}


def _instance(entry: Found) -> Found:
    ((version, address, port),) = serving.instances([entry])
    sick = [c["Output"].strip() or c["Status"] for c in entry["Checks"] if c["Status"] != "passing"]
    node = entry["Node"]["Node"]
    return {"node": node, "version": version, "address": address, "port": port, "sick": "; ".join(sick)}


def _proxy(member: Host) -> Found:
    """vip: the address that it may hold, whether it does, and what is wrong with it; None without one."""
    found: Found = {"wrong": haproxy.fault_of(member), "vip": None}
    if vip.wanted(member):
        found["vip"] = {
            "address": member.data.haproxy_vip,
            "held": vip.holds(member),
            "wrong": keepalived.fault_of(member),
        }
    found["servers"] = serving.haproxy_servers(serving.stats(member), member.data.app_name)
    return found


def _registry(member: Host) -> Found:
    """Version -> digest of what it has."""
    return {"digests": distribute.catalogue(member)}


def _releases(member: Host) -> Found:
    """The audit trail, the lock, and what can be rolled back to."""
    with consul_api(member) as api:
        kept, found = history.entries(api), lock.look(api)
    return {
        "history": [asdict(entry) for entry in kept],
        "lock": asdict(found.holder) | {"alive": bool(found.session)} if found.holder else None,
    }
