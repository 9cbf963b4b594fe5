"""DNS when something else fails; on the proxies, whose Consul is a client that nobody else needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from testinfra.host import Host

from tests.lab import hosts
from tests.lab.test_dns import ask, servers

testinfra_hosts = hosts.testinfra("proxies")


def resolves(host: Host) -> bool:
    return bool(host.run("getent ahostsv4 consul.service.consul").rc == 0)


@pytest.fixture
def consul_stopped(host: Host) -> Iterator[None]:
    host.check_output("systemctl stop consul")
    try:
        yield
    finally:
        host.check_output("systemctl start consul")
        hosts.wait_for("Consul's names", lambda: resolves(host))


@pytest.mark.usefixtures("consul_stopped")
@pytest.mark.parametrize("other", ["example.org", hosts.names("workers")[0]])
def test_other_names_resolve_without_consul(host: Host, other: str) -> None:
    """The resolver gives the answer that the network's own server gives."""
    ours, original, *_ = servers(host)
    assert ask(host, ours, other) == ask(host, original, other)


def test_rewritten_resolv_conf_gets_the_resolver_back(host: Host) -> None:
    """As after a DHCP client's renewal."""
    host.check_output(
        "servers=$(grep -v '^nameserver 127.0.0.1$' /etc/resolv.conf) && echo \"$servers\" > /etc/resolv.conf"
    )
    hosts.wait_for("the resolver to be first again", lambda: resolves(host), deadline_s=10)
