"""What breaks by itself: the stack serves again without anybody's help."""

from __future__ import annotations

import pytest

from group_data import all as knobs
from tests.lab import hosts

pytestmark = pytest.mark.usefixtures("as_found")
cuts_power = pytest.mark.skipif(hosts.SETTINGS.provider != "docker", reason="cuts Docker hosts' power")

WORKERS = hosts.names("workers")
COUNT = knobs.app_count if hosts.SCHEDULER == "nomad" else len(WORKERS)


def test_killed_instance_is_replaced() -> None:
    """HAProxy lets it go, and finds the one that takes its place."""
    server, worker, port = an_instance()
    container = hosts.on(worker, f"docker ps --quiet --filter publish={port}")
    hosts.on(worker, f"docker kill {container}")
    # "UP 1/2" is still in use: one failed check of two.
    hosts.wait_for("HAProxy to drop it", lambda: not hosts.haproxy_servers().get(server, "").startswith("UP"))
    if hosts.SCHEDULER == "docker":  # Docker itself leaves alone what was killed by hand
        hosts.on(worker, f"docker start {container}")
    hosts.wait_for("another to take its place", lambda: len(hosts.serving() or ()) == COUNT)


def test_crashed_instance_is_started_again() -> None:
    _, worker, port = an_instance()
    before = process(worker, port)
    hosts.on(worker, f"kill -9 {before}")
    hosts.wait_for("another process", lambda: process(worker, port) not in ("", "0", before))
    hosts.wait_for("it to serve", lambda: len(hosts.serving() or ()) == COUNT)


def an_instance() -> tuple[str, str, str]:
    """HAProxy's name for it, its worker, and its port there."""
    server = min(hosts.serving() or {"none serves"})
    address, port = server.split("-")[2:]
    return server, next(name for name, data in hosts.HOSTS.items() if data["address"] == address), port


def process(worker: str, port: str) -> str:
    """The ID of the process behind a port; "" or "0" while there is none."""
    ask = "docker inspect --format '{{.State.Pid}}' $(docker ps --quiet --filter publish=%s)"
    return hosts.on(worker, ask % port, check=False).strip()


@cuts_power
def test_each_host_loses_power() -> None:
    """One after the other, each back before the next."""
    for host in hosts.HOSTS:
        hosts.power_off(host)
        if host in WORKERS:
            hosts.wait_for(f"the others to serve without {host}", hosts.running_version)
        hosts.power_on(host)
        hosts.wait_for(f"the cluster to be whole with {host}", is_whole, 180)


@cuts_power
def test_all_hosts_lose_power() -> None:
    hosts.power_off(*hosts.HOSTS)
    hosts.power_on(*hosts.HOSTS)
    hosts.wait_for("the cluster to be whole", is_whole, 300)
    run = hosts.pyinfra("deploy.py")
    assert (run.code, run.changed) == (0, {}), run.output


def is_whole() -> bool:
    return len(hosts.whole() or ()) == COUNT
