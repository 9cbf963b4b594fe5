"""DNS: *.consul resolves on every host and in its containers, other names as before, Consul or not.

The host's own resolver asks Consul for *.consul only: systemd-resolved where the host uses it, else a
dnsmasq of ours that /etc/resolv.conf names first, with the original servers below it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Generator, Iterable

from pyinfra import host
from pyinfra.api import FactBase, deploy, operation

from tasks import config, rolling

CONFIG = "/etc/consul-dns.conf"
UNIT = "/etc/systemd/system/consul-dns.service"
FIRST = "/usr/local/sbin/consul-dns-first"
RESOLVED = "/etc/systemd/resolved.conf.d/consul.conf"


class UsesResolved(FactBase[bool]):
    """Whether the host's lookups go to systemd-resolved's stub."""

    def command(self) -> str:
        return "grep -qs '^nameserver 127.0.0.53' /etc/resolv.conf && echo yes || echo no"

    def process(self, output: Iterable[str]) -> bool:
        return list(output) == ["yes"]


class ResolverIsFirst(FactBase[bool]):
    """Whether /etc/resolv.conf names our resolver first and is watched to stay so."""

    def command(self) -> str:
        return (
            "if systemctl -q is-active consul-dns-first.path"
            " && systemctl -q is-enabled consul-dns-first.path"
            " && [ \"$(grep -sm 1 '^nameserver' /etc/resolv.conf)\" = 'nameserver 127.0.0.1' ];"
            " then echo yes; else echo no; fi"
        )

    def process(self, output: Iterable[str]) -> bool:
        return list(output) == ["yes"]


@deploy("DNS")
def install() -> None:
    if host.get_fact(UsesResolved):
        _resolved()
    else:
        _dnsmasq()


def docker_address() -> str:
    """The address at which a worker's containers ask; "" on a host without Docker."""
    return str(ipaddress.ip_interface(host.data.docker_bip).ip) if "workers" in host.groups else ""


def _resolved() -> None:
    text = config.render(
        "dns/resolved.conf.j2", consul_port=host.data.consul_dns_port, docker_address=docker_address()
    )
    config.write(name="Send *.consul from systemd-resolved to Consul", files=[config.File(RESOLVED, text)])
    rolling.restart_if_stale(
        name="Restart systemd-resolved if its settings are newer",
        unit="systemd-resolved",
        files=[RESOLVED],
    )


def _dnsmasq() -> None:
    text = config.render(
        "dns/dnsmasq.conf.j2",
        consul_port=host.data.consul_dns_port,
        addresses=[address for address in ("127.0.0.1", docker_address()) if address],
    )
    units = ("consul-dns.service", "consul-dns-first.service", "consul-dns-first.path")
    config.write(
        name="Send *.consul from dnsmasq to Consul",
        files=[
            config.File(CONFIG, text),
            config.File(FIRST, config.render("dns/consul-dns-first"), mode="755"),
            *(config.File(f"/etc/systemd/system/{unit}", config.render(f"dns/{unit}")) for unit in units),
        ],
    )
    rolling.restart_if_stale(
        name="Restart the resolver if its settings are newer",
        unit="consul-dns",
        files=[CONFIG, UNIT],
    )
    put_resolver_first(name="Put the resolver first in /etc/resolv.conf, and keep it there")


@operation()
def put_resolver_first() -> Generator[str]:
    """Only when the resolver runs (see `rolling.restart_if_stale`): a host never loses its DNS."""
    if host.get_fact(ResolverIsFirst):
        host.noop("/etc/resolv.conf names the resolver first")
        return
    yield (
        "systemctl daemon-reload && systemctl enable -q consul-dns-first.path"
        " && systemctl start consul-dns-first.path consul-dns-first.service"
    )
