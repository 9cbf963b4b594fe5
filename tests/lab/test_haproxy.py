"""HAProxy and what feeds it, on the proxies."""

from __future__ import annotations

import csv

import pytest
from testinfra.host import Host

from group_data import all as knobs
from tests.lab import hosts

testinfra_hosts = hosts.testinfra("proxies")

LIVE = "/etc/haproxy/haproxy.cfg"
TEMPLATES = "/etc/consul-template"


@pytest.fixture(scope="module")
def config(host: Host) -> dict[str, list[str]]:
    """The live configuration: section, as in "frontend http" -> its lines, without comments."""
    sections: dict[str, list[str]] = {}
    for line in host.file(LIVE).content_string.splitlines():
        if line and not line.startswith((" ", "#")):
            sections[line] = lines = []
        elif line.strip() and not line.lstrip().startswith("#"):
            lines.append(line.strip())
    return sections


@pytest.mark.parametrize("unit", ["haproxy.service", "consul-template.service", "haproxy-apply.path"])
def test_runs(host: Host, unit: str) -> None:
    assert host.service(unit).is_running


@pytest.mark.parametrize("unit", ["haproxy.service", "consul-template.service", "haproxy-apply.path"])
def test_starts_at_boot(host: Host, unit: str) -> None:
    assert host.service(unit).is_enabled


def test_newest_configuration_is_live(host: Host) -> None:
    """haproxy-apply leaves a file with the reason while it is not."""
    assert not host.file("/var/lib/haproxy-apply/fault").exists


def test_apply_has_not_failed(host: Host) -> None:
    assert host.check_output("systemctl show -P Result haproxy-apply.service") == "success"


def test_package_is_held(host: Host) -> None:
    assert "haproxy" in host.check_output("apt-mark showhold").split()


def test_worker_is_not_root(host: Host) -> None:
    assert "haproxy" in {process.user for process in host.process.filter(comm="haproxy")}


def test_consul_template_is_not_root(host: Host) -> None:
    assert host.process.get(comm="consul-template").user == "consul-template"


def test_installed_consul_template_runs(host: Host) -> None:
    binary = f"/usr/local/lib/consul-template/{hosts.knob('consul_template_version')}/consul-template"
    assert host.check_output("readlink /proc/$(systemctl show -P MainPID consul-template)/exe") == binary


@pytest.mark.parametrize(
    ("unit", "setting", "value"),
    [
        ("haproxy", "Restart", "always"),
        # No number of restarts is too many: a limit would end all later updates.
        ("haproxy", "StartLimitIntervalUSec", "0"),
        ("haproxy-apply", "StartLimitIntervalUSec", "0"),
        ("haproxy-apply", "Restart", "on-failure"),
        ("consul-template", "StartLimitIntervalUSec", "0"),
        ("consul-template", "Restart", "always"),
        ("consul-template", "NoNewPrivileges", "yes"),
        ("consul-template", "ProtectSystem", "strict"),
    ],
)
def test_unit(host: Host, unit: str, setting: str, value: str) -> None:
    assert host.check_output("systemctl show -P %s %s", setting, unit) == value


@pytest.mark.parametrize(
    ("path", "mode", "owner"),
    [
        (LIVE, 0o644, "root"),
        ("/usr/local/sbin/haproxy-apply", 0o755, "root"),
        ("/var/lib/consul-template", 0o755, "consul-template"),
        ("/var/lib/haproxy-apply", 0o755, "root"),
        (f"{TEMPLATES}/haproxy.cfg.ctmpl", 0o644, "root"),
    ],
)
def test_mode_and_owner(host: Host, path: str, mode: int, owner: str) -> None:
    file = host.file(path)
    assert (file.mode, file.user, file.group) == (mode, owner, owner)


def test_others_cannot_read_what_will_hold_a_token(host: Host) -> None:
    path = f"{TEMPLATES}/consul-template.hcl"
    assert host.run("test -e %s && ! runuser -u nobody -- test -r %s", path, path).rc == 0


@pytest.mark.parametrize("socket", ["/run/haproxy/admin.sock", "/run/haproxy-master.sock"])
def test_others_cannot_command_it(host: Host, socket: str) -> None:
    assert host.run("test -S %s && ! runuser -u nobody -- test -w %s", socket, socket).rc == 0


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("global", f"maxconn {knobs.haproxy_maxconn}"),
        ("global", "hard-stop-after 60s"),
        ("frontend http", f"bind {knobs.haproxy_bind}:{knobs.haproxy_http_port}"),
        ("frontend http", "option idle-close-on-response"),
        (f"backend {knobs.app_name}", "option redispatch 1"),
        (f"backend {knobs.app_name}", "retry-on conn-failure empty-response response-timeout"),
        (f"backend {knobs.app_name}", "http-request disable-l7-retry unless METH_GET"),
        (f"backend {knobs.app_name}", f"option httpchk GET {knobs.app_health_path}"),
        ("listen stats", f"bind 127.0.0.1:{knobs.haproxy_stats_port}"),
    ],
)
def test_live_configuration_has(config: dict[str, list[str]], section: str, line: str) -> None:
    assert line in config[section]


def test_every_server_is_checked(config: dict[str, list[str]]) -> None:
    (defaults,) = [line for line in config[f"backend {knobs.app_name}"] if line.startswith("default-server")]
    assert "check" in defaults.split()


def test_live_configuration_is_older_than_the_worker(host: Host) -> None:
    """So the worker runs with it."""
    ask = "echo show info | socat - UNIX-CONNECT:/run/haproxy/admin.sock | sed -n 's/^Start_time_sec: //p'"
    assert int(host.check_output(f"stat -c %Y {LIVE}")) <= int(host.check_output(ask))


@pytest.mark.parametrize(
    "line",
    [
        r"attempts\s*=\s*0",  # 0 = for ever
        r'max_backoff\s*=\s*"2s"',
        r'min\s*=\s*"1s"',
        r'max\s*=\s*"4s"',
        rf'address\s*=\s*"{knobs.consul_http_address}:{knobs.consul_http_port}"',
    ],
)
def test_consul_template_setting(host: Host, line: str) -> None:
    assert host.run("grep -qP %s %s", f"^\\s*{line}$", f"{TEMPLATES}/consul-template.hcl").rc == 0


def test_consul_template_is_newer_than_its_settings(host: Host) -> None:
    started = host.check_output('date +%s -d "$(systemctl show -P ActiveEnterTimestamp consul-template)"')
    changed = host.check_output(
        "stat -L -c %%Y %s/consul-template.hcl %s/haproxy.cfg.ctmpl", TEMPLATES, TEMPLATES
    )
    assert max(map(int, changed.split())) <= int(started)


def test_stats_page_answers(host: Host) -> None:
    assert "Statistics Report" in hosts.api(hosts.name_of(host), knobs.haproxy_stats_port, "/")


def test_servers_are_the_instances_that_pass_in_consul(host: Host) -> None:
    def servers() -> dict[str, str]:
        page = host.check_output("echo show stat | socat - UNIX-CONNECT:/run/haproxy/admin.sock")
        rows = [row for row in csv.DictReader(page[2:].splitlines()) if row["pxname"] == knobs.app_name]
        return {row["svname"]: row["status"] for row in rows if row["svname"] != "BACKEND"}

    def wanted() -> dict[str, str]:
        return dict.fromkeys(hosts.consul_instances(), "UP")

    hosts.wait_for("the same servers in both", lambda: servers() == wanted() != {}, deadline_s=20)


def test_answers_on_the_private_address(host: Host) -> None:
    at = f"/dev/tcp/{hosts.address_of(host)}/{knobs.haproxy_http_port}"
    request = rf"GET {knobs.app_health_path} HTTP/1.0\r\n\r\n"
    answer = hosts.on(hosts.names("workers")[0], f"exec 3<>{at}; printf '{request}' >&3; head -n 1 <&3")
    assert answer.split()[1] == "200"
