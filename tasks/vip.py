"""The address that moves between the proxies (knob haproxy_vip): who holds it, and whether it can be had."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from pyinfra import host, inventory
from pyinfra.api import FactBase
from pyinfra.api.host import Host

from tasks import shell


def wanted(member: Host) -> bool:
    """It is a proxy, there is another, and they have an address to share."""
    return (
        "proxies" in member.groups
        and bool(member.data.haproxy_vip)
        and len(inventory.get_group("proxies")) > 1
    )


def peers(member: Host) -> list[str]:
    """The addresses of the other proxies, whether they take part in this run or not."""
    return [h.data.address for h in inventory.get_group("proxies") if h.name != member.name]


def holds(member: Host) -> bool:
    """The proxy that goes last in whatever is restarted one by one."""
    if not wanted(member):
        return False
    return shell.run(member, f"ip -o -4 addr show to {member.data.haproxy_vip}/32 | grep -q .")[0]


class Holder(FactBase[str]):
    """Who answers at the VIP, as this host sees it: the address of a proxy, else a MAC, or "" for nobody.

    No proxy has to be asked, so this works also while one is down. A datagram to port 9 (discard) makes
    the kernel look for the MACs; what it remembered about the VIP is forgotten first.
    """

    def command(self, vip: str, own: str, others: list[str]) -> str:
        return f"""bash -c '
            ip -o -4 addr show to {vip}/32 | grep -q . && echo {own} && exit
            ip neigh flush to {vip} 2>&1
            for peer in {vip} {" ".join(others)}; do echo >/dev/udp/$peer/9; done
            for try in 1 2 3 4 5 6 7 8 9 10; do
                mac=$(ip -4 neigh show to {vip} | grep -o "lladdr [^ ]*")
                for peer in {" ".join(others)}; do
                    [ "$mac" ] && ip -4 neigh show to $peer | grep -q "$mac" && echo $peer && exit
                done
                sleep 0.1
            done
            echo ${{mac#lladdr }}'"""

    def process(self, output: Iterable[str]) -> str:
        return "".join(output).strip()


def holder(member: Host) -> str:
    """As `Holder`, from wherever the code runs."""
    fact = Holder()
    _, output = shell.run(member, fact.command(member.data.haproxy_vip, member.data.address, peers(member)))
    return fact.process(output.stdout_lines)


class Network(FactBase[str]):
    """The host's private address with its prefix, as in 192.168.56.21/24."""

    def command(self, address: str) -> str:
        return f"ip -4 -o addr show to {address}/32 | awk '{{ print $4 }}'"

    def process(self, output: Iterable[str]) -> str:
        return next(iter(output), "")


def faults() -> list[str]:
    """A line if this proxy cannot share the address; in prepare, before anything changes."""
    if not wanted(host):
        return []
    vip, router_id = str(host.data.haproxy_vip), host.data.keepalived_router_id
    if not re.fullmatch(r"\d+(\.\d+){3}", vip):
        return [f"haproxy_vip={vip}: not an IPv4 address; choose a free one in the proxies' network"]
    if not isinstance(router_id, int) or not 1 <= router_id <= 255:
        return [f"keepalived_router_id={router_id}: choose a number from 1 to 255"]
    owners = [h.name for h in inventory if h.data.address == vip]
    if owners:
        return [f"haproxy_vip={vip}: the address of {owners[0]} itself; choose a free one"]
    return _outside(vip) or _taken(vip)


def _outside(vip: str) -> list[str]:
    private = ipaddress.ip_interface(host.get_fact(Network, address=host.data.address) or host.data.address)
    network = private.network
    reserved = (network.network_address, network.broadcast_address)
    if ipaddress.ip_address(vip) in network and ipaddress.ip_address(vip) not in reserved:
        return []
    return [f"haproxy_vip={vip}: not a host's address in {network}, the network of {host.name}; choose one"]


def _taken(vip: str) -> list[str]:
    others = peers(host)
    found = host.get_fact(Holder, vip=vip, own=host.data.address, others=others)
    if not found or found in (host.data.address, *others):
        return []
    return [f"haproxy_vip={vip}: {found}, none of the proxies, answers there; choose a free address"]


class LeftOver(FactBase[bool]):
    """Whether keepalived runs."""

    def command(self) -> str:
        return "systemctl is-active keepalived || true"

    def process(self, output: Iterable[str]) -> bool:
        return list(output) == ["active"]


def warnings() -> list[str]:
    """Lines about what works, but not as it may be meant."""
    if "proxies" not in host.groups or wanted(host):
        return []
    if len(inventory.get_group("proxies")) > 1:
        return ["several proxies and no haproxy_vip: no address moves to another when one is lost"]
    if host.get_fact(LeftOver):
        return [
            "keepalived still runs here and may hold an address that clients use, though there is one proxy"
            " now; once none does: apt-get purge keepalived"
        ]
    return []
