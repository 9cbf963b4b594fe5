"""A survey (tasks/survey.py) judged and printed: what is wrong and what to do, and one screen of the rest."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from tasks import history, serving

Found = dict[str, Any]
DEPLOY = "run deploy.py"
RENEW_DAYS = 30  # deploy.py renews a certificate long before
LOOK = "if it stays, look at journalctl -u {unit} there"


# What is wrong, a line each: what, where, and what to do


def faults(found: Found) -> list[str]:
    """Empty if all is healthy."""
    judges = [_hosts, _tools, _certificates, _consul, _nomad, _app, _proxies, _registries, _releases]
    return [line for judge in judges for line in judge(found)]


def _hosts(found: Found) -> Iterable[str]:
    for name, host in found["hosts"].items():
        if host.get("reached") is False:
            yield f"{name}: not reached over SSH; repair or replace it"
        elif "fault" in host:
            yield f"{name}: {host['fault']}; repair it"


def _tools(found: Found) -> Iterable[str]:
    for name, host in found["hosts"].items():
        for tool, version in host.get("tools", {}).items():
            if not version["running"]:
                yield f"{name}: {tool} does not run; {DEPLOY}"
            elif version["running"] != version["installed"]:
                yield f"{name}: {tool} {version['running']} runs, not {version['installed']}; {DEPLOY}"


def _certificates(found: Found) -> Iterable[str]:
    for name, host in found["hosts"].items():
        for whose, days in (host.get("certificates") or {}).items():
            if days < RENEW_DAYS:
                ends = f"ends in {days} days" if days >= 0 else "has ended"
                how = "pyinfra inventory.py rotate.py --data what=ca" if whose == "CA" else DEPLOY
                yield f"{name}: the certificate of {whose} {ends}; {how}"


def _consul(found: Found) -> Iterable[str]:
    consul = found["consul"]
    yield from _quorum("Consul", found, consul)
    for name in _missing(found, "", [name for name, alive in consul.get("members", {}).items() if alive]):
        yield f"{name}: no member of Consul; {DEPLOY}"


def _nomad(found: Found) -> Iterable[str]:
    nomad = found["nomad"]
    if nomad is None:
        return
    yield from _quorum("Nomad", found, nomad)
    if "fault" in nomad:
        return
    for name in _missing(found, "workers", nomad["nodes"]):
        yield f"{name}: no client of Nomad; {DEPLOY}"
    for name, is_ in nomad["nodes"].items():
        if is_ in ("draining", "ineligible"):
            yield f"{name}: {is_} in Nomad; when its work is done: nomad node eligibility -enable"
        elif is_ != "ready":
            yield f"{name}: {is_} in Nomad; repair it or {DEPLOY}"


def _quorum(what: str, found: Found, cluster: Found) -> Iterable[str]:
    if "fault" in cluster:
        yield f"{what}: {cluster['fault']}; {DEPLOY}"
        return
    if not cluster["leader"]:
        yield f"{what}: no leader; start the servers that are down, or {DEPLOY}"
    for name in _members(found, "servers"):
        if not cluster["servers"].get(found["hosts"][name].get("address")):
            yield f"{name}: no healthy voter in {what}; {LOOK.format(unit=what.lower())}"


def _members(found: Found, group: str) -> list[str]:
    """The hosts of a group ("" = all) that were reached: of the others that alone is said."""
    return [
        name
        for name, host in found["hosts"].items()
        if host.get("reached") and (not group or group in host["groups"])
    ]


def _missing(found: Found, group: str, there: Iterable[str]) -> list[str]:
    if "fault" in found["consul"]:
        return []  # said already
    return [name for name in _members(found, group) if name not in list(there)]


def _app(found: Found) -> Iterable[str]:
    app = found["app"]
    if "fault" in app:
        return  # Consul's silence was said
    well = [i for i in app["instances"] if not i["sick"]]
    for instance in app["instances"]:
        if instance["sick"]:
            yield f"{instance['node']}: {app['name']} {instance['version']} is unhealthy: {instance['sick']}"
    versions = sorted({i["version"] for i in app["instances"]})
    if not versions:
        yield f"{app['name']}: nothing serves; run release.py --data version=..."
    elif len(versions) > 1 and not _under_way(found):
        yield f"{app['name']}: {' and '.join(versions)} serve together; release or roll back to one of them"
    elif app["wanted"] and len(well) < app["wanted"]:
        yield f"{app['name']}: {len(well)} of {app['wanted']} instances serve; look at: nomad job status"
    elif not app["wanted"]:
        for name in sorted(set(_members(found, "workers")) - {i["node"] for i in app["instances"]}):
            yield f"{name}: no instance of {app['name']}; release {versions[-1]} again"


def _under_way(found: Found) -> bool:
    lock = found["releases"].get("lock")
    return bool(lock and lock["alive"])


def _proxies(found: Found) -> Iterable[str]:
    """While a release is under way HAProxy may be a moment behind Consul."""
    app = found["app"]
    for name, proxy in found["proxies"].items():
        if "fault" in proxy or proxy["wrong"]:
            yield f"{name}: HAProxy: {proxy.get('fault') or proxy['wrong']}; {DEPLOY}"
        elif "fault" not in app and not _under_way(found):
            wrong = serving.difference(proxy["servers"], app["name"], _serving(app))
            if wrong:
                yield f"{name}: {wrong}; {LOOK.format(unit='consul-template')}"
    shared = {name: proxy["vip"] for name, proxy in found["proxies"].items() if proxy.get("vip")}
    for name, vip in shared.items():
        if vip["wrong"]:
            yield f"{name}: keepalived: {vip['wrong']}; {DEPLOY}"
    holders = [name for name, vip in shared.items() if vip["held"]]
    if len(holders) > 1:
        address = shared[holders[0]]["address"]
        yield f"{' and '.join(holders)} both hold {address}; look at the network between them"


def _serving(app: Found) -> set[serving.Instance]:
    return {(i["version"], i["address"], i["port"]) for i in app["instances"] if not i["sick"]}


def _registries(found: Found) -> Iterable[str]:
    running = {i["version"] for i in found["app"].get("instances", [])}
    known: dict[str, set[str]] = {}
    for registry in found["registries"].values():
        for version, digest in registry.get("digests", {}).items():
            known.setdefault(version, set()).add(digest)
    for version, digests in known.items():
        if len(digests) > 1:
            yield f"{version}: the registries hold different images of it; delete the wrong one"
    for name, registry in found["registries"].items():
        if "fault" in registry:
            yield f"{name}: its registry does not answer ({registry['fault']}); {DEPLOY}"
        elif not _under_way(found):
            for version in sorted(running - registry["digests"].keys()):
                look = LOOK.format(unit="registry-sync")
                yield f"{name}: its registry lacks {version}, and fetches it within minutes; {look}"


def _releases(found: Found) -> Iterable[str]:
    kept = found["releases"].get("history", [])
    if kept and kept[-1]["result"] == history.UNDER_WAY and not _under_way(found):
        last = kept[-1]
        yield f"the {last['action']} to {last['version']} was cut off; run it again, or roll back"


# What can be rolled back to


def candidates(found: Found) -> dict[str, str]:
    """Version -> digest of what was in service before and every worker that answers still holds."""
    held = [host["images"] for host in found["hosts"].values() if host.get("images") is not None]
    running = {i["version"] for i in found["app"].get("instances", [])}
    kept = [history.Entry(**entry) for entry in found["releases"].get("history", [])]
    remembered = chain.from_iterable(host.get("containers", []) for host in found["hosts"].values())
    before = [*history.served(kept), *((found["nomad"] or {}).get("stable", [])), *remembered]
    return {
        version: held[0][version]
        for version in before
        if version not in running and held and all(h.get(version) == held[0].get(version, 0) for h in held)
    }


# One screen


def table(found: Found, wrong: list[str]) -> str:
    """All of it as text: what is wrong comes last, where the eye is."""
    sections = [
        ("hosts", _host_rows(found)),
        ("leaders", _leader_rows(found)),
        ("app", _app_rows(found)),
        ("proxies", _proxy_rows(found)),
        ("registries", _registry_rows(found)),
        ("rollback", [[v, digest[:19]] for v, digest in candidates(found).items()] or [["nothing held"]]),
        ("releases", _release_rows(found)),
        ("lock", [[_lock_line(found["releases"].get("lock"))]]),
        ("certificates", _certificate_rows(found)),
        ("wrong", [[line] for line in wrong] or [["nothing: all is healthy"]]),
    ]
    return "\n".join(_section(name, rows) for name, rows in sections)


def _section(name: str, rows: list[list[str]]) -> str:
    widths = [max(len(row[n]) for row in rows if len(row) > n) for n in range(max(map(len, rows), default=0))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows]
    return "\n".join(
        f"{name if first else '':<14}{line}".rstrip()
        for first, line in zip([1, *[0] * len(lines)], lines, strict=False)
    )


def _host_rows(found: Found) -> list[list[str]]:
    return [
        [name, host.get("address", ""), ",".join(host.get("groups", [])), _host_line(host)]
        for name, host in found["hosts"].items()
    ]


def _host_line(host: Found) -> str:
    if host.get("reached") is False or "fault" in host:
        return str(host.get("fault", "NOT REACHED"))
    return ", ".join(
        f"{tool} {version['running'] or 'stopped'}{' (local build, unsigned)' if version['unsigned'] else ''}"
        for tool, version in host["tools"].items()
    )


def _certificate_rows(found: Found) -> list[list[str]]:
    """The days that each has left."""
    rows = [
        [name, ", ".join(f"{whose} {days} days" for whose, days in host["certificates"].items())]
        for name, host in found["hosts"].items()
        if host.get("certificates")
    ]
    return rows or [["NONE: secure = False, nothing is encrypted"]]


def _leader_rows(found: Found) -> list[list[str]]:
    names = {host.get("address"): name for name, host in found["hosts"].items()}
    rows = []
    for what in ("consul", "nomad"):
        cluster = found[what]
        if cluster and "fault" in cluster:
            rows.append([what, cluster["fault"]])
        elif cluster:
            servers = cluster["servers"]
            there = len(cluster.get("members", cluster.get("nodes")))
            rows.append(
                [
                    what,
                    names.get(cluster["leader"], cluster["leader"]) or "NONE",
                    f"{sum(servers.values())} of {len(servers)} servers healthy",
                    f"{there} {'members' if what == 'consul' else 'clients'}",
                ]
            )
    return rows


def _app_rows(found: Found) -> list[list[str]]:
    app = found["app"]
    rows = [
        [
            i["node"],
            app["name"],
            i["version"],
            f"{i['address']}:{i['port']}",
            "UNHEALTHY" if i["sick"] else "passing",
        ]
        for i in app.get("instances", [])
    ]
    return rows or [[app.get("fault", "no instance")]]


def _proxy_rows(found: Found) -> list[list[str]]:
    rows = []
    for name, proxy in found["proxies"].items():
        servers = proxy.get("servers", {})
        up = sum(status.startswith("UP") for status in servers.values())
        words = proxy.get("fault") or proxy["wrong"] or "its configuration is current"
        vip = proxy.get("vip") or {}
        held = [f"holds {vip['address']}"] if vip.get("held") else []
        rows.append([name, f"{up} of {len(servers)} servers up", ", ".join([words, *held])])
    return rows or [["none reached"]]


def _registry_rows(found: Found) -> list[list[str]]:
    """One row for each version and digest, with the workers that hold it."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, registry in found["registries"].items():
        for version, digest in registry.get("digests", {}).items():
            rows.setdefault((version, digest), []).append(name)
    silent = [
        [name, registry["fault"]] for name, registry in found["registries"].items() if "fault" in registry
    ]
    return [
        [version, digest[:19], " ".join(names)] for (version, digest), names in rows.items()
    ] + silent or [["empty"]]


def _release_rows(found: Found, most: int = 5) -> list[list[str]]:
    last = found["releases"].get("history", [])[: -most - 1 : -1]
    rows = [
        [
            entry["when"],
            entry["action"],
            entry["version"],
            entry["digest"][:19],
            entry["who"],
            f"{entry['seconds']} s",
            _short(entry["result"]),
        ]
        for entry in last
    ]
    return rows or [["none noted"]]


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def _lock_line(lock: Found | None) -> str:
    if not lock:
        return "free"
    held = f"{lock['who']} since {lock['since']} for: {lock['what']}"
    return f"held by {held}" if lock["alive"] else f"left by a run that crashed or lost it: {held}"
