"""What serves now, as Consul and each HAProxy see it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

from pyinfra import host
from pyinfra.api.host import Host

from tasks import cluster, rolling

# One instance: (version, address, port). Version "unknown" is one without a version- tag.
Instance = tuple[str, str, int]


def instances(entries: list[dict[str, Any]]) -> set[Instance]:
    """Consul's health entries of the app's service as instances."""
    return {
        (
            (entry["Service"].get("Meta") or {}).get("version", "unknown"),
            entry["Service"]["Address"] or entry["Node"]["Address"],
            entry["Service"]["Port"],
        )
        for entry in entries
    }


def consul_fault(found: set[Instance], version: str, count: int | None) -> str | None:
    """Exactly `count` passing instances (None: at least one), all of `version`; else what is there."""
    others = sorted({v for v, _, _ in found if v != version})
    if others:
        return f"{', '.join(others)} is still in Consul"
    if not found or (count is not None and len(found) != count):
        return f"{len(found)} of {count or 'its'} instances of {version} pass in Consul"
    return None


def haproxy_servers(stats: str, app: str) -> dict[str, str]:
    """Server of the app's backend -> UP, DOWN ..., from HAProxy's statistics (CSV)."""
    rows = csv.DictReader(io.StringIO(stats.lstrip("# ")))
    return {
        row["svname"]: row["status"]
        for row in rows
        if row["pxname"] == app and row["svname"] not in ("FRONTEND", "BACKEND")
    }


def haproxy_fault(stats: str, app: str, found: set[Instance]) -> str | None:
    """HAProxy's statistics (CSV) have exactly Consul's instances as servers, and all are up."""
    return difference(haproxy_servers(stats, app), app, found)


def difference(servers: dict[str, str], app: str, found: set[Instance]) -> str | None:
    """The same for servers that were read already."""
    expected = {f"{app}-{version}-{address}-{port}" for version, address, port in found}
    wrong = [f"{name} is not in HAProxy" for name in sorted(expected - servers.keys())]
    wrong += [f"{name} is still in HAProxy" for name in sorted(servers.keys() - expected)]
    wrong += [f"{name} is {is_}" for name, is_ in sorted(servers.items()) if not is_.startswith("UP")]
    return "; ".join(wrong) or None


def passing() -> set[Instance]:
    """The app's passing instances, as the Consul agent of this host knows them."""
    with cluster.consul_api(host) as api:
        return instances(api.health.service(host.data.app_name, passing=True)[1])


def running_versions() -> set[str]:
    """Versions of all the app's instances in Consul, healthy or not."""
    with cluster.consul_api(host) as api:
        return {v for v, _, _ in instances(api.health.service(host.data.app_name)[1])}


def exactly(version: str) -> Callable[[], str | None]:
    """A question for a proxy: does exactly `version` serve, in Consul and through its HAProxy?

    Nomad runs app_count instances; the docker scheduler one on each worker that it could reach.
    """
    count = host.data.app_count if host.data.scheduler == "nomad" else None

    def fault() -> str | None:
        found = passing()
        return consul_fault(found, version, count) or haproxy_fault(stats(host), host.data.app_name, found)

    return fault


def stats(member: Host) -> str:
    """HAProxy's statistics on a proxy, as CSV."""
    with cluster.forward(member, member.data.haproxy_stats_port) as port, cluster.http_session() as http:
        answer = http.get(f"http://127.0.0.1:{port}/;csv", timeout=cluster.TIMEOUT_S)
    answer.raise_for_status()
    return answer.text


def failing_checks(worker: str, allocation_id: str) -> str:
    """What the health checks of a Nomad allocation say while they fail; "" if nothing is known.

    The worker's own agent is asked: the catalog learns of a check's words only with its status.
    """
    try:
        for member in rolling.members("workers"):
            if member.name == worker:
                with cluster.consul_api(member) as api:
                    return failures(api.agent.checks(), allocation_id)
    except cluster.Unavailable:
        pass
    return ""


def failures(checks: dict[str, dict[str, Any]], allocation_id: str) -> str:
    """The words of one allocation's checks that do not pass, from a Consul agent's checks."""
    outputs = [
        " ".join(check["Output"].split()).removesuffix(" Output:")
        for check in checks.values()
        if allocation_id in check["ServiceID"] and check["Status"] != "passing"
    ]
    return "; ".join(filter(None, outputs))
