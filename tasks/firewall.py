"""nftables on every host: nobody comes in but through an opening of the table below (docs/ports.md).

The rules stand in a table of our own, replaced in one transaction: connections go on, and so does what
Docker and others have set up. New rules are on trial at first. A timer on the host takes them back unless
an SSH connection that was made under them stops it: rules that lock us out last for firewall_trial_s.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from pyinfra import host, inventory, logger
from pyinfra.api import FunctionCommand, StringCommand, deploy, operation
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.host import Host, HostData
from pyinfra.api.state import State

from tasks import config, dns, haproxy, shell, vip

RULES = "/etc/hashistack/firewall.nft"
SCRIPT = "/usr/local/sbin/hashistack-firewall"
UNIT = "/etc/systemd/system/hashistack-firewall.service"
PROTOCOLS = {"vrrp": "112"}  # a minimal Debian has no /etc/protocols
NOMAD_DYNAMIC_PORTS = "20000-32000"  # its defaults, min_dynamic_port and max_dynamic_port


@dataclass(frozen=True)
class Opening:
    """What the hosts of `group` accept, and from whom.

    group: "hosts" for every host. sources: groups, or addresses and networks; none: anyone.
    protocol: tcp, udp, or another one, which has no ports. ports: as nft writes them.
    """

    group: str
    protocol: str
    ports: str
    sources: tuple[str, ...]
    what: str

    def rules(self) -> list[str]:
        """What a packet has to match, for each kind of source."""
        which = f"meta l4proto {PROTOCOLS.get(self.protocol, self.protocol)}"
        if self.ports:
            which += f" ct original proto-dst {{ {self.ports} }}"
        return [f"{which} {source}".strip() for source in map(_from, self.sources or ("",))]


def _from(source: str) -> str:
    if not source:
        return ""
    if source[0].isalpha() and ":" not in source:
        return f"ip saddr @{source}"
    return f"{'ip6' if ':' in source else 'ip'} saddr {source}"


def openings(data: HostData) -> list[Opening]:
    """The port table, without SSH, which is open to anyone on every host."""
    nomad = [
        Opening("servers", "tcp", "4647", ("workers",), "Nomad: servers and clients"),
        Opening("servers", "tcp", "4648", ("servers",), "Nomad: gossip of the servers"),
        Opening("servers", "udp", "4648", ("servers",), "Nomad: gossip of the servers"),
    ]
    https = [Opening("proxies", "tcp", str(data.haproxy_https_port), (), "HAProxy, TLS")]
    return [
        Opening("hosts", "tcp", "8301", ("hosts",), "Consul: gossip"),
        Opening("hosts", "udp", "8301", ("hosts",), "Consul: gossip"),
        Opening("servers", "tcp", "8300", ("hosts",), "Consul: servers and clients"),
        Opening("servers", "tcp", "8302", ("servers",), "Consul: gossip between datacenters"),
        Opening("servers", "udp", "8302", ("servers",), "Consul: gossip between datacenters"),
        *(nomad if data.scheduler == "nomad" else []),
        Opening("workers", "tcp", str(data.registry_port), ("workers",), "registry: copies of images"),
        Opening("workers", "tcp", app_ports(data), ("workers", "proxies"), "the app's instances"),
        Opening("proxies", "tcp", str(data.haproxy_http_port), (), "HAProxy"),
        *(https if haproxy.encrypts(data) else []),
        Opening("proxies", "vrrp", "", ("proxies",), "keepalived: who holds the shared address"),
        *(
            Opening(
                "hosts", one["protocol"], str(one["ports"]), tuple(one.get("sources", ())), "firewall_extra"
            )
            for one in data.firewall_extra
        ),
    ]


def app_ports(data: HostData) -> str:
    """Where the app's instances listen on a worker."""
    return ", ".join(map(str, data.app_ports)) if data.scheduler == "docker" else NOMAD_DYNAMIC_PORTS


def mine(member: Host) -> list[Opening]:
    """The openings of this host."""
    return [
        opening
        for opening in openings(member.data)
        if opening.group in ("hosts", *member.groups) and (opening.protocol != "vrrp" or vip.wanted(member))
    ]


def _groups() -> dict[str, list[str]]:
    """Group -> its hosts' addresses, whether they take part in this run or not."""
    members = {"hosts": list(inventory)}
    members |= {g: [h for h in inventory if g in h.groups] for g in ("servers", "workers", "proxies")}
    return {group: sorted(h.data.address for h in found) for group, found in members.items()}


@deploy("Firewall")
def install() -> None:
    if not host.data.firewall:
        remove(name="Take our rules away")
        return
    rules = config.render(
        "firewall/firewall.nft.j2",
        groups=_groups(),
        openings=mine(host),
        docker_address=dns.docker_address(),
        app_ports=app_ports(host.data),
    )
    config.write(
        name="Write the firewall's rules",
        files=[
            config.File(RULES, rules),
            config.File(SCRIPT, config.render("firewall/hashistack-firewall"), mode="755"),
            config.File(UNIT, config.render("firewall/hashistack-firewall.service")),
        ],
    )
    enforce(name="Enforce the rules, unless they lock us out")


@operation()
def enforce() -> Generator[str | FunctionCommand]:
    """Load rules that are not in force yet, on trial, and confirm them through a connection of their own."""
    if host.get_fact(haproxy.Answer, condition=f"{SCRIPT} settled"):
        host.noop("the rules are in force")
        return
    yield f"{SCRIPT} try {host.data.firewall_trial_s}"
    yield FunctionCommand(_confirm, (), {})


def _confirm(state: State, host: Host) -> bool:
    fault = _confirm_through_new_connection(state, host)
    if fault:
        taken_back = shell.fault(host, f"{SCRIPT} revert")
        logger.error(
            f"{host.print_prefix}the new firewall rules are taken back"
            f"{f' in {host.data.firewall_trial_s} s' if taken_back else ''}: {fault};"
            " is firewall_ssh_port the port of its sshd?"
        )
    return fault is None


def _confirm_through_new_connection(state: State, host: Host) -> str | None:
    """What went wrong, or None. The connection of this run is known to the rules, and proves nothing."""
    fresh = type(host.connector)(state, host)
    try:
        fresh.connect()
        ok, output = fresh.run_shell_command(StringCommand(f"{SCRIPT} confirm"), **shell.how(host))
    except (ConnectError, OSError, EOFError) as error:
        return f"no new SSH connection came through ({error or type(error).__name__})"
    finally:
        client = getattr(fresh, "client", None)
        if client:
            client.close()
    return None if ok else (output.stderr_lines or ["no message"])[-1]


@operation()
def remove() -> Generator[str]:
    """Where the knob `firewall` is off."""
    if host.get_fact(haproxy.Answer, condition=f"! test -e {SCRIPT}"):
        host.noop("no rules of ours")
        return
    yield f"{SCRIPT} remove && rm -f {SCRIPT} {UNIT} {RULES} && systemctl daemon-reload"
