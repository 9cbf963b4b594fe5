"""What every host needs before the roles: packages, time, kernel settings, the journal's size."""

from __future__ import annotations

from collections.abc import Generator

from pyinfra import host
from pyinfra.api import deploy, operation
from pyinfra.facts.deb import DebPackages
from pyinfra.operations import apt

from tasks import certificates, config, rolling, secrets, vip

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
    # An interrupted run's apt may still be at work, or the system's own.
    wait = f"-o DPkg::Lock::Timeout={host.data.roll_deadline_s}"
    yield from apt.packages._inner(packages=missing, no_recommends=True, extra_install_args=wait)


def packages() -> list[str]:
    """One list, so that all hosts install at the same time whatever they become."""
    wanted = list(host.data.base_packages)
    if "workers" in host.groups:
        wanted += host.data.docker_packages
    if "proxies" in host.groups:
        wanted += host.data.haproxy_packages
    if vip.wanted(host):
        wanted += host.data.keepalived_packages
    return wanted


@deploy("Base")
def install() -> None:
    install_packages(name="Install the packages", packages=packages())


def _ca() -> list[config.File]:
    """What every host trusts."""
    if not host.data.secure:
        return []
    return [config.File(certificates.CA_FILE, certificates.ca(secrets.folder(host.data)))]


def trust(pem: str) -> None:
    """While the CA is changed."""
    config.write(name="Write which CA the host trusts", files=[config.File(certificates.CA_FILE, pem)])


@deploy("Base")
def configure() -> None:
    settings = "".join(f"{key} = {value}\n" for key, value in host.data.base_sysctl.items())
    config.write(
        name="Write the base settings",
        files=[
            config.File(ADDRESS_UNIT, config.render("base/private-address.service.j2")),
            config.File(JOURNAL, config.render("base/journald.conf.j2")),
            config.File(SYSCTL, settings),
            *_ca(),
        ],
    )
    rolling.restart_if_stale(
        name="Apply the kernel settings if they are newer", unit="systemd-sysctl", files=[SYSCTL]
    )
    rolling.restart_if_stale(
        name="Restart the journal if its limit is newer",
        unit="systemd-journald",
        files=[JOURNAL],
    )
