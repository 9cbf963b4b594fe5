"""Refuse in one line, before anything changes, what cannot end well."""

from __future__ import annotations

from collections.abc import Generator, Iterable

from pyinfra import host, inventory, logger, state
from pyinfra.api import DeployError, FactBase, operation
from pyinfra.facts.server import LinuxDistribution

from tasks import artifact, certificates, config, consul, registry, rolling, secrets, vip


def check_hosts() -> None:
    """Every host of this run was reached. Call it first, in prepare."""
    down = sorted(h.name for h in state.failed_hosts)
    if down:
        names = ", ".join(down)
        flags = " ".join(f"--exclude {name}" for name in down)
        raise DeployError(f"{names}: not reached over SSH; repair it, or go on without: {flags}")


def check_workers() -> None:
    """Releases, rollbacks and questions about them are for workers."""
    if not rolling.members("workers"):
        raise DeployError("no worker takes part in this run: correct --limit or --exclude")


def wanted(roles: list[str]) -> set[str]:
    """The roles of `--data only=haproxy,dns`; all of them by default."""
    only = [role for role in str(host.data.only).split(",") if role]
    unknown = [role for role in only if role not in roles]
    if unknown:
        raise DeployError(f"only={host.data.only}: no role {', '.join(unknown)}; roles: {', '.join(roles)}")
    return set(only or roles)


def check_host() -> None:
    """This host can become what the inventory asks for."""
    distro = host.get_fact(LinuxDistribution)
    release = f"{distro['release_meta'].get('ID')} {distro['major']}"
    if release == "debian 13":
        logger.warning(f"{host.print_prefix}Debian 13 is untested")
    elif release != "debian 12":
        raise DeployError(f"{host.name}: runs {distro['name']}; use Debian 12 (13 is untested)")
    lines = (
        wrong_address()
        + scheduler_change()
        + security_change()
        + artifact.faults(host, tools())
        + vip.faults()
    )
    if "workers" in host.groups:
        lines += registry.faults()
    for line in lines:
        raise DeployError(line)
    for line in artifact.unsigned(host) + vip.warnings():
        logger.warning(f"{host.print_prefix}{line}")


class OtherAddresses(FactBase[list[str]]):
    """The addresses that the host has instead of `address`; none if it has that one."""

    default = list

    def command(self, address: str) -> str:
        show = "ip -o -4 addr show"
        return f"{show} | grep -F ' {address}/' >/dev/null || {show} scope global | awk '{{print $4}}'"

    def process(self, output: Iterable[str]) -> list[str]:
        return list(output)


def wrong_address() -> list[str]:
    """A line if this host's address is on none of its NICs: every service would wait for it."""
    others = host.get_fact(OtherAddresses, address=host.data.address)
    if not others:
        return []
    return [
        f"{host.name}: {host.data.address} is on none of its NICs, which have {', '.join(others)};"
        " correct `address` in inventory.py, or attach the NIC"
    ]


def tools() -> list[str]:
    """The artifacts that this host runs."""
    nomad = "workers" in host.groups and host.data.scheduler == "nomad"
    return [
        "consul",
        *(["nomad"] if nomad else []),
        *(["consul-template"] if "proxies" in host.groups else []),
    ]


class RunningScheduler(FactBase[str]):
    """What runs the app on a worker: "nomad", "docker" (containers of ours), or "" for neither."""

    def command(self) -> str:
        return (
            "if systemctl is-active -q nomad; then echo nomad;"
            " elif command -v docker >/dev/null && docker ps -aq --filter label=hashistack.app | grep -q .;"
            " then echo docker; fi"
        )

    def process(self, output: Iterable[str]) -> str:
        return "".join(output).strip()


def scheduler_change() -> list[str]:
    """A line if this worker's app is run by the other scheduler: that would be an outage."""
    running = host.get_fact(RunningScheduler)
    if not running or running == host.data.scheduler:  # None: pyinfra's answer for no output
        return []
    return [
        f"{host.name}: {running} runs its app, scheduler={host.data.scheduler} would cut it off;"
        f" set scheduler={running}, or start from new hosts"
    ]


class RunsOpen(FactBase[bool]):
    """Whether Consul runs here without keys, tokens and certificates."""

    def command(self) -> str:
        return f"if systemctl is-active -q consul && ! test -e {consul.SECRETS}; then echo open; fi"

    def process(self, output: Iterable[str]) -> bool:
        return list(output) == ["open"]


def security_change() -> list[str]:
    """A line if this host's agents run the other way: changed one by one, they would not hear each other."""
    if host.data.secure and host.get_fact(RunsOpen):
        return [
            f"{host.name}: Consul runs without encryption, secure=True would cut it off from the others;"
            " set secure=False, or start from new hosts"
        ]
    if host.data.secure or not host.get_fact(config.Found, paths=[certificates.CA_FILE]):
        return []
    return [
        f"{host.name}: is secured, secure=False would cut it off from the others;"
        " set secure=True, or start from new hosts"
    ]


def check_groups() -> None:
    """The groups make a cluster."""
    count = len(inventory.get_group("servers"))
    if not rolling.driver():
        return
    if count not in (3, 5):
        logger.warning(
            f"{count} servers: {'no majority survives a split' if count % 2 == 0 else 'a quorum needs more'}"
            "; use 3 or 5"
        )


def make_secrets() -> None:
    """What was never made on this controller is made, all of it together."""
    if not host.data.secure:
        if rolling.driver():
            logger.warning("secure = False: nothing is encrypted, and anyone on this network may change all")
        return
    where = secrets.folder(host.data)
    secrets.make(where)
    certificates.make(where)
    if unfinished := secrets.unfinished(where):
        raise DeployError(f"a rotation of {', '.join(unfinished)} was cut off: run rotate.py again to end it")
    certificates.operator(where)


@operation()
def stop_at_first_failure() -> Generator[str]:
    """From here on one failed host ends the run: what comes after it may need that host.

    An operation, since the setting in a deploy file is ignored, and in the inventory it would already
    abort at a host that is down, before we can name it.
    """
    state.config.FAIL_PERCENT = 0
    host.noop("a failed host ends the run")
    yield from ()
