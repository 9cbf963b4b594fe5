"""What every host needs before the roles: packages, time, kernel settings, the journal's size."""

from __future__ import annotations

from collections.abc import Generator
from io import StringIO

from pyinfra import host
from pyinfra.api import deploy, operation
from pyinfra.facts.deb import DebPackages
from pyinfra.operations import apt, files, server

from tasks import rolling

SYSCTL = "/etc/sysctl.d/60-hashistack.conf"
JOURNAL = "/etc/systemd/journald.conf.d/hashistack.conf"
ADDRESS_UNIT = "/etc/systemd/system/private-address.service"


@operation()
def install_packages(packages: list[str]) -> Generator[str]:
    """Install what is missing; the package lists are fetched only then, so a second run is quiet."""
    installed = host.get_fact(DebPackages)
    missing = [name for name in packages if name not in installed]
    if not missing:
        host.noop("all packages are installed")
        return
    yield "apt-get update -q"
    yield from apt.packages._inner(packages=missing, no_recommends=True)


def packages() -> list[str]:
    """One list, so that all hosts install at the same time whatever they become."""
    wanted = list(host.data.base_packages)
    if "workers" in host.groups:
        wanted += host.data.docker_packages
    if "proxies" in host.groups:
        wanted += host.data.haproxy_packages
    return wanted


@deploy("Base")
def install() -> None:
    install_packages(name="Install the packages", packages=packages())


@deploy("Base")
def configure() -> None:
    files.template(
        name="Write the unit that waits for the private address",
        src="templates/base/private-address.service.j2",
        dest=ADDRESS_UNIT,
        mode="644",
    )
    sysctl = files.put(
        name="Write the kernel settings",
        src=StringIO("".join(f"{key} = {value}\n" for key, value in host.data.base_sysctl.items())),
        dest=SYSCTL,
        mode="644",
    )
    server.shell(name="Apply the kernel settings", commands=[f"sysctl -q -p {SYSCTL}"], _if=sysctl.did_change)
    files.template(name="Limit the journal", src="templates/base/journald.conf.j2", dest=JOURNAL, mode="644")
    rolling.restart_if_stale(
        name="Restart the journal if its limit is newer",
        unit="systemd-journald",
        files=[JOURNAL],
    )
