"""DNS in a worker's containers."""

from testinfra.host import Host

import inventory
from tests.lab import hosts

testinfra_hosts = hosts.urls(inventory.workers)

RUN = "docker run --rm --entrypoint python3 hashistack/app-base:1 -c"


def test_consul_resolves_in_a_container(host: Host) -> None:
    lookup = 'import socket; print(socket.gethostbyname("consul.service.consul"))'
    assert host.run(f"{RUN} '{lookup}'").rc == 0


def test_a_container_asks_the_host(host: Host) -> None:
    servers = host.check_output(f"{RUN} 'print(open(\"/etc/resolv.conf\").read())' | grep ^nameserver")
    bridge = host.check_output("ip -4 -o addr show docker0 | grep -o '[0-9.]*/' | tr -d /")
    assert servers == f"nameserver {bridge}"
