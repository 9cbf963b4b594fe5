"""status.py's judgement: a healthy cluster has no fault, and each way to be sick has its own line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tasks import report

WORKERS = {f"worker-0{n}": f"192.168.56.1{n}" for n in (1, 2, 3)}
DIGESTS = {"0.0.2": "sha256:two", "0.0.3": "sha256:three"}


def tools(*names: str) -> dict[str, Any]:
    return {name: {"running": "1.0.0", "installed": "1.0.0", "unsigned": name == "consul"} for name in names}


def healthy() -> dict[str, Any]:
    """As tasks/survey.py gathers it from a lab with Nomad."""
    hosts: dict[str, Any] = {
        name: {
            "address": address,
            "groups": ["servers", "workers"],
            "reached": True,
            "tools": tools("consul", "nomad"),
            "images": dict(DIGESTS),
            "certificates": {"CA": 3649, "consul": 364, "nomad": 364},
        }
        for name, address in WORKERS.items()
    }
    hosts["proxy-01"] = {
        "address": "192.168.56.21",
        "groups": ["proxies"],
        "reached": True,
        "tools": tools("consul", "consul-template"),
        "certificates": {"CA": 3649, "consul": 364},
    }
    instances = [
        {"node": name, "version": "0.0.3", "address": address, "port": 20001, "sick": ""}
        for name, address in WORKERS.items()
    ]
    voters = {address: True for address in WORKERS.values()}
    return {
        "hosts": hosts,
        "consul": {"leader": "192.168.56.12", "members": dict.fromkeys(hosts, True), "servers": dict(voters)},
        "nomad": {
            "leader": "192.168.56.12",
            "nodes": dict.fromkeys(WORKERS, "ready"),
            "servers": dict(voters),
            "stable": ["0.0.3", "0.0.2"],
        },
        "app": {"name": "app", "wanted": 3, "instances": instances},
        "proxies": {
            "proxy-01": {"wrong": None, "servers": {f"app-0.0.3-{a}-20001": "UP" for a in WORKERS.values()}}
        },
        "registries": {name: {"digests": dict(DIGESTS)} for name in WORKERS},
        "releases": {"history": [release("0.0.2"), release("0.0.3")], "lock": None},
    }


def release(version: str, result: str = "in service") -> dict[str, Any]:
    return {
        "who": "ann@laptop",
        "when": f"2026-11-25T01:00:0{version[-1]}Z",
        "action": "release",
        "version": version,
        "digest": DIGESTS.get(version, ""),
        "result": result,
        "seconds": 31,
    }


LOCK = {
    "who": "ann@laptop",
    "since": "2026-11-25T01:00:00Z",
    "what": "release 0.0.4",
    "beat": 3,
    "alive": True,
}


def changed(**values: object) -> dict[str, Any]:
    """The healthy cluster with some values replaced: a path's parts are joined by two underscores."""
    found = healthy()
    for path, value in values.items():
        *parents, last = [part.replace("_0", "-0") for part in path.split("__")]
        part = found
        for parent in parents:
            part = part[int(parent)] if isinstance(part, list) else part[parent]
        part[last] = value
    return found


def test_a_healthy_cluster_has_no_fault() -> None:
    assert report.faults(healthy()) == []
    assert "nothing: all is healthy" in report.table(healthy(), [])


THIRD_SICK = {address: address != "192.168.56.13" for address in WORKERS.values()}
SECOND_GONE = {"worker-01": "ready", "worker-03": "ready"}
ONLY_OLD = {"0.0.2": "sha256:two"}
OTHER = {**DIGESTS, "0.0.2": "sha256:other"}
VIP = {"address": "192.168.56.20", "held": True, "wrong": None}
BOTH = {name: {**healthy()["proxies"]["proxy-01"], "vip": VIP} for name in ("proxy-01", "proxy-02")}
CUT_OFF = [release("0.0.3"), release("0.0.4", "under way")]

# Where the healthy cluster is changed, to what, and how the line about it begins.
SICK: list[tuple[str, object, str]] = [
    ("hosts__worker_02__reached", False, "worker-02: not reached over SSH"),
    ("hosts__worker_02", {"fault": "no answer in 5 s"}, "worker-02: no answer in 5 s"),
    ("hosts__worker_02__tools__nomad__running", "", "worker-02: nomad does not run"),
    ("hosts__worker_02__tools__nomad__running", "0.9.0", "worker-02: nomad 0.9.0 runs, not 1.0.0"),
    (
        "hosts__worker_02__certificates__nomad",
        29,
        "worker-02: the certificate of nomad ends in 29 days; run deploy.py",
    ),
    ("hosts__worker_02__certificates__consul", -1, "worker-02: the certificate of consul has ended"),
    ("hosts__worker_02__certificates__CA", 9, "worker-02: the certificate of CA ends in 9 days; pyinfra"),
    ("consul", {"fault": "connection refused"}, "Consul: connection refused"),
    ("consul__leader", "", "Consul: no leader"),
    ("consul__servers", THIRD_SICK, "worker-03: no healthy voter in Consul"),
    ("consul__members__proxy_01", False, "proxy-01: no member of Consul"),
    ("nomad", {"fault": "connection refused"}, "Nomad: connection refused"),
    ("nomad__servers", THIRD_SICK, "worker-03: no healthy voter in Nomad"),
    ("nomad__nodes__worker_02", "draining", "worker-02: draining in Nomad"),
    ("nomad__nodes__worker_02", "down", "worker-02: down in Nomad"),
    ("nomad__nodes", SECOND_GONE, "worker-02: no client of Nomad"),
    ("app__instances__1__sick", "503", "worker-02: app 0.0.3 is unhealthy: 503"),
    ("app__instances", [], "app: nothing serves"),
    ("app__wanted", 4, "app: 3 of 4 instances serve"),
    ("app__instances__1__version", "0.0.2", "app: 0.0.2 and 0.0.3 serve together"),
    ("proxies__proxy_01__wrong", "it does not run", "proxy-01: HAProxy: it does not run"),
    ("proxies__proxy_01", {"fault": "refused"}, "proxy-01: HAProxy: refused"),
    ("proxies__proxy_01__servers", {}, "proxy-01: app-0.0.3-192.168.56.11-20001 is not in HAProxy"),
    ("proxies__proxy_01__vip", {**VIP, "wrong": "its NIC is gone"}, "proxy-01: keepalived: its NIC is gone"),
    ("proxies", BOTH, "proxy-01 and proxy-02 both hold 192.168.56.20"),
    ("registries__worker_02", {"fault": "refused"}, "worker-02: its registry does not answer (refused)"),
    ("registries__worker_02__digests", ONLY_OLD, "worker-02: its registry lacks 0.0.3"),
    ("registries__worker_02__digests", OTHER, "0.0.2: the registries hold different images"),
    ("releases__history", CUT_OFF, "the release to 0.0.4 was cut off"),
]


@pytest.mark.parametrize(("where", "value", "line"), SICK, ids=lambda part: str(part)[:30])
def test_each_way_to_be_sick_has_its_line_and_can_be_printed(where: str, value: object, line: str) -> None:
    found = changed(**{where: value})
    wrong = report.faults(found)
    assert [one for one in wrong if one.startswith(line)], wrong
    assert line in report.table(found, wrong)
    json.dumps(found)


def test_a_release_under_way_is_no_fault() -> None:
    found = changed(
        app__instances__1__version="0.0.2",
        releases__lock=LOCK,
        releases__history=[release("0.0.3"), release("0.0.4", "under way")],
    )
    assert report.faults(found) == []
    assert "held by ann@laptop since 2026-11-25T01:00:00Z for: release 0.0.4" in report.table(found, [])


def test_the_lock_of_a_crashed_run_excuses_nothing() -> None:
    found = changed(app__instances__1__version="0.0.2", releases__lock={**LOCK, "alive": False})
    assert any("serve together" in line for line in report.faults(found))
    assert "left by a run that crashed" in report.table(found, [])


def test_docker_scheduler_has_one_instance_on_each_worker_and_no_nomad() -> None:
    found = changed(nomad=None, app__wanted=None)
    assert report.faults(found) == []
    found["app"]["instances"].pop()
    assert any(line.startswith("worker-03: no instance of app") for line in report.faults(found))


def test_rollback_is_to_what_served_and_all_workers_hold() -> None:
    assert report.candidates(healthy()) == {"0.0.2": "sha256:two"}
    assert report.candidates(changed(hosts__worker_02__images={"0.0.3": "sha256:three"})) == {}
    lost_trail = changed(releases__history=[])
    assert report.candidates(lost_trail) == {"0.0.2": "sha256:two"}
    by_docker = {**lost_trail, "nomad": None}
    assert report.candidates(by_docker) == {}
    by_docker["hosts"]["worker-02"]["containers"] = ["0.0.3", "0.0.2"]
    assert report.candidates(by_docker) == {"0.0.2": "sha256:two"}


def test_everything_down_is_still_a_table() -> None:
    nothing = {"fault": "no host to ask"}
    found: dict[str, Any] = {
        "hosts": {
            name: {"address": host["address"], "groups": host["groups"], "reached": False}
            for name, host in healthy()["hosts"].items()
        },
        **{part: dict(nothing) for part in ("consul", "nomad", "app", "releases")},
        "proxies": {},
        "registries": {},
    }
    wrong = report.faults(found)
    assert {
        "Consul: no host to ask; run deploy.py",
        "worker-01: not reached over SSH; repair or replace it",
    } <= {*wrong}
    assert "NOT REACHED" in report.table(found, wrong)


def test_of_a_host_that_is_down_only_that_is_said() -> None:
    found = changed(
        hosts__worker_03={**healthy()["hosts"]["worker-03"], "reached": False, "images": None},
        consul__members__worker_03=False,
        consul__servers=THIRD_SICK,
    )
    assert report.faults(found) == ["worker-03: not reached over SSH; repair or replace it"]


def test_an_unsigned_local_build_is_called_so() -> None:
    assert "consul 1.0.0 (local build, unsigned), nomad 1.0.0" in report.table(healthy(), [])


def test_the_holder_of_the_shared_address_is_shown() -> None:
    found = changed(proxies__proxy_01__vip=VIP)
    assert report.faults(found) == []
    assert "holds 192.168.56.20" in report.table(found, [])


def test_the_days_left_are_shown() -> None:
    assert "worker-02  CA 3649 days, consul 364 days, nomad 364 days" in report.table(healthy(), [])


def test_without_security_it_says_so() -> None:
    found = healthy()
    for host in found["hosts"].values():
        host["certificates"] = None
    assert "NONE: secure = False, nothing is encrypted" in report.table(found, [])
