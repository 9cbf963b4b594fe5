"""The table of faults: where it happens, how it is brought about and mended, and what may fail meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from group_data import all as knobs
from tests.lab import hosts
from tests.lab.test_proxies import VIP, holders, inside

WORKERS, SERVERS, PROXIES = (hosts.names(group) for group in ("workers", "servers", "proxies"))


@dataclass(frozen=True)
class MayFail:
    """Requests that may fail: these methods, if sent at most `within_s` seconds after the fault."""

    said: str
    methods: tuple[str, ...] = ()
    within_s: float = 0.0


NOTHING = MayFail("none")
# They may have done their work before the host was lost: nobody but the client knows if to send them again.
IN_FLIGHT = MayFail("POSTs in flight there", ("POST",))
# Nomad takes the instances of a dockerd that died for ended, and kills them when Docker is back.
KILLED_LATER = MayFail("POSTs in flight there", ("POST",), 10.0)
FAILOVER = MayFail("all, for 3 s", ("GET", "POST"), 3.0)


# Where


def leader_of(port: int) -> list[str]:
    leader = hosts.api(SERVERS[0], port, "/v1/status/leader").rpartition(":")[0]
    return [name for name in SERVERS if hosts.HOSTS[name]["address"] == leader]


def nomad_leader() -> list[str]:
    return leader_of(knobs.nomad_http_port)


def consul_leader() -> list[str]:
    return leader_of(knobs.consul_http_port)


def a_worker() -> list[str]:
    """One that serves; if there is a choice, one that leads nothing: its loss is nothing but that."""
    leaders = consul_leader() + (nomad_leader() if hosts.SCHEDULER == "nomad" else [])
    addresses = {instance.split("-")[-2] for instance in hosts.consul_instances()}
    serving = [name for name in WORKERS if hosts.HOSTS[name]["address"] in addresses]
    return sorted(serving, key=lambda name: name in leaders)[:1]


def not_the_builder() -> list[str]:
    """A worker that gets images from others."""
    return [name for name in WORKERS if name not in hosts.names("builder")][:1]


def servers() -> list[str]:
    return SERVERS


def active_proxy() -> list[str]:
    return holders() if VIP else PROXIES[:1]


# How

POWER_OFF, POWER_ON = "pull the plug", "plug it in"
NIC = "nic=$(ip -o -4 address show to ADDRESS/32 | cut -d ' ' -f 2)"
PULL = f"{NIC}; ip link set $nic down"
# Nothing comes in and nothing goes out, from and to its containers neither. Nobody is told.
CUT_OFF = (
    f"{NIC}; iptables -t raw -A PREROUTING -i $nic -j DROP; iptables -t mangle -A POSTROUTING -o $nic -j DROP"
)
REJOIN = CUT_OFF.replace("-A ", "-D ")
SPOOL, LIVE = "/var/lib/consul-template/haproxy.cfg", "/etc/haproxy/haproxy.cfg"
# haproxy -c says yes; the worker dies, since no process may open so many files.
TOO_MANY_FILES = f"sed 's/^    maxconn .*/    maxconn 2000000/' {LIVE} >{SPOOL}.new; mv {SPOOL}.new {SPOOL}"
AS_IT_WAS = f"cp {LIVE} {SPOOL}.new; mv {SPOOL}.new {SPOOL}"
# Docker downloads into this folder.
DOWNLOADS = "/var/lib/docker/tmp"
FILL = f"mount -t tmpfs -o size=4k none {DOWNLOADS}; head -c 4096 /dev/zero >{DOWNLOADS}/full"
REGISTRY = "$(docker ps --quiet --filter name=^registry)"


def killed(unit: str) -> str:
    return f"kill -9 $(systemctl show -P MainPID {unit})"


def do(members: list[str], what: str) -> float:
    """On each host, without SSH, which may be cut off; answers when that was, by the monotonic clock."""
    if what == POWER_ON:
        hosts.power_on(*members)
        return time.monotonic()
    command = PULL if what == POWER_OFF else what
    for name in members:
        inside(name, command.replace("ADDRESS", hosts.HOSTS[name]["address"]))
    done = time.monotonic()
    if what == POWER_OFF:  # what the host does until then reaches nobody
        hosts.power_off(*members)
    return done


# The table


@dataclass(frozen=True)
class Fault:
    """One row.

    breaks and mends: a shell command on the hosts that `where` names at that moment; "" where it heals by
    itself. sign: a pattern of an event that shows that it did happen. idle: whether it is tried without a
    release, and then stays for `stays_s` seconds. release: the exit code of a release on whose way it
    happens, None if that is not tried; it is mended after the release. needs: "nomad" or "VIP".
    quick: `make test` tries it, too, "idle" or "release".
    """

    name: str
    where: Callable[[], list[str]]
    breaks: str
    mends: str
    sign: str
    may_fail: MayFail = NOTHING
    idle: bool = True
    release: int | None = 0
    stays_s: float = 5
    needs: str = ""
    quick: str = ""


FAULTS = [
    Fault(
        "Nomad leader killed",
        nomad_leader,
        killed("nomad"),
        "",
        "Nomad: leads",
        needs="nomad",
        quick="release",
    ),
    Fault("Consul leader killed", consul_leader, killed("consul"), "", "Consul: leads", quick="idle"),
    Fault("dockerd killed", a_worker, killed("docker"), "", "docker died", KILLED_LATER),
    Fault(
        "HAProxy worker killed",
        active_proxy,
        "pkill -9 -u haproxy -x haproxy",
        "",
        "haproxy died",
        FAILOVER,
        quick="idle",
    ),
    Fault("consul-template killed", active_proxy, killed("consul-template"), "", "consul-template died"),
    Fault("worker powered off", a_worker, POWER_OFF, POWER_ON, "is DOWN", IN_FLIGHT, release=1, stays_s=30),
    Fault(
        "worker with the Nomad leader powered off",
        nomad_leader,
        POWER_OFF,
        POWER_ON,
        "Nomad: leads",
        IN_FLIGHT,
        idle=False,
        release=1,
        needs="nomad",
    ),
    Fault(
        "active proxy powered off",
        active_proxy,
        POWER_OFF,
        POWER_ON,
        "MASTER",
        FAILOVER,
        release=None,
        stays_s=10,
        needs="VIP",
    ),
    Fault(
        "registry of a worker hangs",
        a_worker,
        f"docker pause {REGISTRY}",
        f"docker unpause {REGISTRY}",
        "a check fails",
        idle=False,
    ),
    Fault(
        "all Consul servers stopped",
        servers,
        "systemctl stop consul",
        "systemctl start consul",
        "consul stopped",
        release=None,
        stays_s=20,
    ),
    Fault("worker cut off", a_worker, CUT_OFF, REJOIN, "is DOWN", IN_FLIGHT, release=None, stays_s=40),
    Fault(
        "HAProxy dies of its new configuration",
        active_proxy,
        TOO_MANY_FILES,
        AS_IT_WAS,
        "no new worker came up",
        release=None,
        stays_s=10,
        quick="idle",
    ),
]
DISK_FULL = Fault(
    "disk full on a worker", not_the_builder, FILL, f"umount {DOWNLOADS}", "", idle=False, release=1
)


def cannot(fault: Fault) -> str:
    """Why this lab cannot have the fault; "" if it can."""
    if fault.needs == "nomad" and hosts.SCHEDULER != "nomad":
        return "the docker scheduler does without Nomad"
    if fault.needs == "VIP" and not VIP:
        return "this lab has one proxy: make up PROXIES=2"
    return ""
