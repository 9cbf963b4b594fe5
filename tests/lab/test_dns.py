"""DNS on every host."""

import pytest
from testinfra.host import Host

import inventory
from group_data.all import docker_bip
from tests.lab import hosts

testinfra_hosts = hosts.urls(inventory.workers + inventory.proxies)


@pytest.mark.parametrize("unit", ["consul-dns.service", "consul-dns-first.path"])
def test_unit_runs(host: Host, unit: str) -> None:
    assert host.service(unit).is_running


@pytest.mark.parametrize("unit", ["consul-dns.service", "consul-dns-first.path"])
def test_unit_starts_at_boot(host: Host, unit: str) -> None:
    assert host.service(unit).is_enabled


def test_consul_resolves(host: Host) -> None:
    assert host.run("getent ahostsv4 consul.service.consul").rc == 0


def test_unknown_service_does_not_resolve(host: Host) -> None:
    assert host.run("getent hosts no-such-name.service.consul").rc == 2


def test_resolv_conf_keeps_the_original_servers(host: Host) -> None:
    servers = host.check_output("grep ^nameserver /etc/resolv.conf").splitlines()
    assert servers[0] == "nameserver 127.0.0.1"
    assert len(servers) > 1


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_resolver_listens_for_the_host_and_its_containers_only(host: Host, protocol: str) -> None:
    listening = host.socket.get_listening_sockets()
    port_53 = {s for s in listening if s.startswith(protocol) and s.endswith(":53")}
    containers_ask = docker_bip.split("/")[0]
    assert port_53 <= {f"{protocol}://127.0.0.1:53", f"{protocol}://{containers_ask}:53"}
