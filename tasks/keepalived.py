"""keepalived on group `proxies`, where there are two: one of them holds the address that clients use.

HAProxy without an answer makes a proxy unfit to hold it; consul-template down only makes the other one
preferred, so the address never vanishes because both lack it. With one proxy nothing of this is there.
"""

from __future__ import annotations

from collections.abc import Generator

from pyinfra import host
from pyinfra.api import deploy, operation
from pyinfra.api.host import Host

from tasks import config, haproxy, rolling, shell, vip

CONFIG = "/etc/keepalived/keepalived.conf"
SCRIPTS = "/usr/local/lib/keepalived"
NIC = "/run/keepalived-nic.conf"
DROP_IN = "/etc/systemd/system/keepalived.service.d/hashistack.conf"
FILES = [CONFIG, DROP_IN]
# keepalived's own exit code says nothing: 2.2.7 is terminated after the check whenever there is a
# script_user (keepalived#2617). What it complains about, it prints.
CHECK = (
    f"wrong=$(keepalived --config-test --use-file={CONFIG} 2>&1 | grep -vx Terminated);"
    ' [ -z "$wrong" ] || { echo "$wrong" >&2; false; }'
)


@deploy("keepalived")
def install() -> None:
    haproxy.hold_package(name="Hold keepalived's package", package="keepalived")
    config.create_user(name="Create the user of keepalived's scripts", user="keepalived_script")
    config.write(
        name="Configure keepalived",
        files=[
            config.File(f"{SCRIPTS}/find-nic", config.render("keepalived/find-nic"), mode="755"),
            config.File(
                f"{SCRIPTS}/haproxy-answers", config.render("keepalived/haproxy-answers"), mode="755"
            ),
            config.File(DROP_IN, config.render("keepalived/service.conf.j2")),
            config.File(CONFIG, config.render("keepalived/keepalived.conf.j2", peers=vip.peers(host))),
        ],
    )
    rolling.start_if_stopped(name="Start keepalived where it is stopped", unit="keepalived", files=FILES)
    follow_nic(name="Restart keepalived where the NIC that it uses is gone")


@operation()
def follow_nic() -> Generator[str]:
    """A NIC that was replaced may have another name. Without its own, keepalived cannot hold the address,
    and would not take it ever again."""
    if host.get_fact(haproxy.Answer, condition=_has_nic(host)):
        host.noop("keepalived knows the NIC")
        return
    yield rolling.restart_command("keepalived")


def _has_nic(member: Host) -> str:
    return f"{SCRIPTS}/find-nic {member.data.address} | cmp -s - {NIC}"


@deploy("keepalived")
def roll() -> None:
    """Reload one proxy at a time, then see on each that one of them holds the address."""
    if rolling.driver() and any(vip.wanted(member) for member in rolling.members("proxies")):
        rolling.roll(name="Reload keepalived where it is stale, one proxy at a time", service=SERVICE)
    if vip.wanted(host):
        rolling.wait_until_healthy(
            name="Check that a proxy holds the address", what="keepalived", fault=lambda: fault_of(host)
        )


def fault_of(member: Host) -> str | None:
    """What is wrong with the shared address as this proxy sees it, or None."""
    if not shell.run(member, "systemctl is-active -q keepalived")[0]:
        return "it does not run"
    if not shell.run(member, _has_nic(member))[0]:
        return "its NIC is gone"
    found = vip.holder(member)
    if found in (member.data.address, *vip.peers(member)):
        return None
    return f"{found or 'nobody'} answers at {member.data.haproxy_vip}, but no proxy"


def _reload(member: Host, unit: str) -> str | None:
    """Never a restart: that would move the address and cut the connections to it."""
    return shell.fault(
        member, f"{CHECK} && systemctl daemon-reload && systemctl enable -q {unit} && systemctl reload {unit}"
    )


SERVICE = rolling.Service(
    unit="keepalived",
    files=FILES,
    rank=lambda member: 1,
    gate=lambda member: None,
    recovery=lambda member: lambda: fault_of(member),
    group="proxies",
    restart=_reload,
    since="StateChangeTimestamp",  # a reload does not change when the process started
)
