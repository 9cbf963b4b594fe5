"""DNS on every host."""

from __future__ import annotations

import pytest
from testinfra.host import Host

from group_data import all as knobs
from tests.lab import hosts

testinfra_hosts = hosts.testinfra("workers", "proxies")

# What one DNS server answers: the code (0 found, 3 no such name, 5 refused), and whether with an address.
# Its arguments are the server and the name.
ASK = """
import socket, sys
name = b"".join(bytes([len(part)]) + part.encode() for part in sys.argv[2].split("."))
asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asking.settimeout(10)
asking.sendto(b"ab\\1\\0\\0\\1" + bytes(6) + name + b"\\0\\0\\1\\0\\1", (sys.argv[1], 53))
answer = asking.recv(4096)
print(answer[3] & 15, answer[6:8] > bytes(2))
"""


def ask(host: Host, server: str, name: str) -> str:
    return str(host.check_output("python3 -c %s %s %s", ASK, server, name))


def servers(host: Host) -> list[str]:
    return list(host.check_output("sed -n 's/^nameserver //p' /etc/resolv.conf").splitlines())


def addresses(host: Host, name: str) -> set[str]:
    """As any program on the host gets them."""
    lines = host.check_output("getent ahostsv4 %s", name).splitlines()
    return {line.split()[0] for line in lines}


@pytest.mark.parametrize("unit", ["consul-dns.service", "consul-dns-first.path"])
def test_runs(host: Host, unit: str) -> None:
    assert host.service(unit).is_running


@pytest.mark.parametrize("unit", ["consul-dns.service", "consul-dns-first.service", "consul-dns-first.path"])
def test_starts_at_boot(host: Host, unit: str) -> None:
    assert host.service(unit).is_enabled


def test_resolver_is_not_root(host: Host) -> None:
    assert host.process.get(comm="dnsmasq").user == "dnsmasq"


def test_consul_resolves(host: Host) -> None:
    servers = {hosts.HOSTS[name]["address"] for name in hosts.names("servers")}
    assert set() < addresses(host, "consul.service.consul") <= servers


def test_app_resolves(host: Host) -> None:
    instances = {name.rsplit("-", 2)[1] for name in hosts.consul_instances()}
    assert set() < addresses(host, f"{knobs.app_name}.service.consul") <= instances


def test_unknown_service_does_not_resolve(host: Host) -> None:
    assert host.run("getent hosts no-such-name.service.consul").rc == 2


@pytest.mark.parametrize("other", ["example.org", "no-such-name.invalid", *hosts.HOSTS])
def test_other_names_resolve_as_the_network_says(host: Host, other: str) -> None:
    """Whether found or not: it is the answer of the server that the host had before."""
    ours, original, *_ = servers(host)
    assert ask(host, ours, other) == ask(host, original, other)


@pytest.mark.skipif(hosts.SETTINGS.provider != "docker", reason="only Docker's own DNS knows the lab's hosts")
@pytest.mark.parametrize("other", hosts.HOSTS)
def test_other_names_resolve(host: Host, other: str) -> None:
    assert hosts.HOSTS[other]["address"] in addresses(host, other)


def test_resolv_conf_is_a_file(host: Host) -> None:
    assert host.check_output("stat -c %%F %s", "/etc/resolv.conf") == "regular file"


def test_resolv_conf_names_the_resolver_first(host: Host) -> None:
    assert servers(host)[0] == "127.0.0.1"


def test_resolv_conf_keeps_the_original_servers(host: Host) -> None:
    assert len(set(servers(host)) - {"127.0.0.1"}) >= 1


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_resolver_listens_for_the_host_and_its_containers_only(host: Host, protocol: str) -> None:
    listening = host.socket.get_listening_sockets()
    port_53 = {s for s in listening if s.startswith(protocol) and s.endswith(":53")}
    containers_ask = (
        knobs.docker_bip.split("/")[0] if hosts.name_of(host) in hosts.names("workers") else "127.0.0.1"
    )
    assert port_53 == {f"{protocol}://127.0.0.1:53", f"{protocol}://{containers_ask}:53"}
