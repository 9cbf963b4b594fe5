"""Every host: who listens where, kernel settings, the journal, time, and no unit that failed."""

from __future__ import annotations

import re
from fnmatch import fnmatch

import pytest
from testinfra.host import Host

from group_data import all as knobs
from tests.lab import hosts

testinfra_hosts = hosts.testinfra("workers", "proxies")

BRIDGE = knobs.docker_bip.split("/")[0]
# Patterns of "process address:port". Whatever else listens is a fault; {private} is the host's own address.
EVERYWHERE = [
    "sshd *:22",
    "dhclient *:68",
    "consul {private}:8301",
    f"consul 127.0.0.1:{knobs.consul_http_port}",
    f"consul 127.0.0.1:{knobs.consul_https_port}",
    f"consul 127.0.0.1:{knobs.consul_dns_port}",
    "dnsmasq 127.0.0.1:53",
    # The ports from which it asks other servers, open until they answer.
    "dnsmasq 0.0.0.0:[1-6]????",
    # Of no process: the engine that runs the lab's hosts answers DNS inside of them.
    " 127.0.0.11:*",
]
BY_GROUP = {
    "servers": [
        "consul {private}:8300",
        "consul {private}:8302",
        "nomad {private}:4647",
        "nomad {private}:4648",
    ],
    "workers": [
        f"nomad 127.0.0.1:{knobs.nomad_http_port}",
        f"dnsmasq {BRIDGE}:53",
        "containerd 127.0.0.1:*",
        f"docker-proxy 127.0.0.1:{knobs.registry_port}",
        f"docker-proxy {{private}}:{knobs.registry_port}",
        # The app's: Nomad's dynamic ports, and app_ports.
        "docker-proxy {private}:[23]????",
    ],
    "proxies": [
        f"haproxy 127.0.0.1:{knobs.haproxy_stats_port}",
        f"haproxy {knobs.haproxy_bind}:{knobs.haproxy_http_port}",
    ],
}


def listeners(host: Host) -> list[str]:
    """ "process address:port" of each TCP and UDP socket that anyone may send to."""
    found = []
    for line in host.check_output("ss -H -ltnup").splitlines():
        local = line.split()[4]
        processes = set(re.findall(r'\("([^"]+)",pid', line)) or {""}
        found += [f"{process} {local}" for process in processes]
    return found


def allowed(host: Host) -> list[str]:
    name = hosts.name_of(host)
    groups = [patterns for group, patterns in BY_GROUP.items() if name in hosts.names(group)]
    return [pattern.format(private=hosts.address_of(host)) for pattern in sum(groups, EVERYWHERE)]


def test_nothing_else_listens(host: Host) -> None:
    patterns = allowed(host)
    assert [one for one in listeners(host) if not any(fnmatch(one, pattern) for pattern in patterns)] == []


def test_listeners_are_seen(host: Host) -> None:
    assert f"consul 127.0.0.1:{knobs.consul_http_port}" in listeners(host)


def test_no_unit_failed(host: Host) -> None:
    assert host.check_output("systemctl list-units --failed --no-legend --plain") == ""


def test_systemd_knows_the_units_as_they_are(host: Host) -> None:
    stale = "systemctl show -p Id -p NeedDaemonReload '*.service' | grep -B 1 NeedDaemonReload=yes"
    assert host.run(stale).stdout == ""


def test_private_address_is_found(host: Host) -> None:
    assert host.service("private-address").is_running


@pytest.mark.parametrize("package", knobs.base_packages)
def test_package_is_installed(host: Host, package: str) -> None:
    assert host.package(package).is_installed


@pytest.mark.parametrize("key", knobs.base_sysctl)
def test_kernel_setting_is_in_effect(host: Host, key: str) -> None:
    value = host.check_output("cat %s", f"/proc/sys/{key.replace('.', '/')}")
    assert value == str(knobs.base_sysctl[key])


def test_journal_is_persistent_and_limited(host: Host) -> None:
    """As the journal said itself when it started last."""
    used_at_start = "ec387f577b844b8fa948f33cad9a75e6"
    told = host.check_output(
        "journalctl MESSAGE_ID=%s -o cat | grep '^System Journal' | tail -n 1", used_at_start
    )
    limit = f"{knobs.base_journal_max[:-1]}.0{knobs.base_journal_max[-1]}"
    assert re.match(rf"System Journal \(/var/log/journal/\w+\) is .*, max {re.escape(limit)},", told)


def test_time_is_kept(host: Host) -> None:
    assert host.service("systemd-timesyncd").is_enabled


def test_time_is_synchronised(host: Host) -> None:
    if host.run("systemd-detect-virt -q --container").rc == 0:
        pytest.skip("a host that is a container has the clock of the machine under it")
    assert host.service("systemd-timesyncd").is_running


@pytest.mark.parametrize(
    "path", ["/usr/local/bin", "/usr/local/lib", "/usr/local/sbin", "/etc/systemd/system"]
)
def test_only_root_can_change_what_root_runs(host: Host, path: str) -> None:
    assert host.check_output("find %s ! -type l '(' ! -user root -o -perm /022 ')'", path) == ""
