"""DNS when something else fails; on the proxies, whose Consul is a client that nobody else needs."""

import time
from collections.abc import Callable, Iterator

import pytest
from testinfra.host import Host

import inventory
from tests.lab import hosts

testinfra_hosts = hosts.urls(inventory.proxies)

# Prints the answer's code (0 found, 3 no such name, 5 refused) from one server, which is its argument.
ASK = """
import socket, sys
query = b"ab\\1\\0\\0\\1" + bytes(6) + b"\\7example\\3org\\0\\0\\1\\0\\1"
asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asking.settimeout(10)
asking.sendto(query, (sys.argv[1], 53))
print(asking.recv(4096)[3] & 15)
"""


def ask(host: Host, server: str) -> int:
    return int(host.check_output("python3 -c %s %s", ASK, server))


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
    return True


def resolves(host: Host) -> bool:
    return bool(host.run("getent ahostsv4 consul.service.consul").rc == 0)


@pytest.fixture
def consul_stopped(host: Host) -> Iterator[None]:
    host.check_output("systemctl stop consul")
    try:
        yield
    finally:
        host.check_output("systemctl start consul")
        assert within(60, lambda: resolves(host))


@pytest.mark.usefixtures("consul_stopped")
def test_other_names_resolve_without_consul(host: Host) -> None:
    """The resolver gives the answer that the network's own server gives."""
    servers = host.check_output("grep ^nameserver /etc/resolv.conf").split()[1::2]
    assert ask(host, servers[0]) == ask(host, servers[1])


def test_rewritten_resolv_conf_gets_the_resolver_back(host: Host) -> None:
    """As after a DHCP client's renewal."""
    host.check_output(
        "servers=$(grep -v '^nameserver 127.0.0.1$' /etc/resolv.conf) && echo \"$servers\" > /etc/resolv.conf"
    )
    assert within(10, lambda: resolves(host))
