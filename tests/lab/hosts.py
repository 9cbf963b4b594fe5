"""The lab, as its tests use it: hosts over SSH, pyinfra runs, and waiting on a condition."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from testinfra.host import Host

import inventory
from group_data import all as knobs
from lab import settings
from tasks import secrets

ROOT = settings.ROOT
SETTINGS = settings.load()
SCHEDULER: str = SETTINGS.data.get("scheduler", "nomad")
URL = f"http://127.0.0.1:{SETTINGS.http_port}"
HOSTS: dict[str, dict[str, Any]] = dict(inventory.workers + inventory.proxies)
SSH_CONFIG = ROOT / ".vagrant" / "tests-ssh-config"


def names(group: str) -> list[str]:
    """The hosts of an inventory group."""
    return [name for name, _ in getattr(inventory, group)]


def write_ssh_config() -> None:
    """One connection per host for all tests, with the keys that pyinfra uses."""
    text = _ssh_config()
    # Other threads' ssh may read it at this moment: a file that is right is not written again.
    if not SSH_CONFIG.exists() or SSH_CONFIG.read_text() != text:
        SSH_CONFIG.write_text(text)


def _ssh_config() -> str:
    if "ssh_config_file" in next(iter(HOSTS.values())):
        return f"Include {next(iter(HOSTS.values()))['ssh_config_file']}\n"
    return "".join(
        f"Host {name}\n"
        f"  HostName {data['ssh_hostname']}\n"
        f"  User {data['ssh_user']}\n"
        f"  IdentityFile {data['ssh_key']}\n"
        f"  UserKnownHostsFile {data['ssh_known_hosts_file']}\n"
        "  StrictHostKeyChecking accept-new\n"
        "  LogLevel ERROR\n"
        "  ConnectTimeout 5\n"
        "  ControlMaster auto\n"
        "  ControlPath /tmp/hashistack-%C\n"
        "  ControlPersist 60\n"
        for name, data in HOSTS.items()
    )


def testinfra(*groups: str) -> list[str]:
    """What `testinfra_hosts` takes, for the hosts of these groups."""
    write_ssh_config()
    members = dict.fromkeys(name for group in groups for name in names(group))
    return [f"ssh://{name}?ssh_config={SSH_CONFIG}&sudo=true" for name in members]


def name_of(host: Host) -> str:
    """The inventory's name of testinfra's `host`."""
    name: str = host.backend.get_hostname()
    return name


def address_of(host: Host) -> str:
    """The private address of testinfra's `host`."""
    address: str = HOSTS[name_of(host)]["address"]
    return address


def knob(name: str) -> Any:  # noqa: ANN401
    """A knob as these hosts have it: what `make up` found out wins over group_data."""
    return SETTINGS.data.get(name, getattr(knobs, name))


def on(host: str, command: str, check: bool = True) -> str:
    """Run a shell command as root on a host; its standard output."""
    write_ssh_config()
    done = subprocess.run(
        ["ssh", "-F", str(SSH_CONFIG), host, "sudo", "bash", "-s"],
        input=command,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if check and done.returncode:
        raise AssertionError(f"{host}: {command!r} failed: {done.stderr or done.stdout}")
    return done.stdout


def on_all(members: list[str], command: str) -> dict[str, str]:
    """Run it on several hosts at once; host -> its standard output."""
    with ThreadPoolExecutor(len(members)) as pool:
        return dict(zip(members, pool.map(lambda host: on(host, command), members), strict=True))


def api(host: str, port: int, path: str) -> Any:  # noqa: ANN401
    """GET from an API on a host's loopback: its JSON, or its text. Bare hosts have no curl, but bash."""
    if port == knobs.nomad_http_port and knob("secure"):
        answer = nomad(host, "GET", path)
    else:
        request = rf"GET {path} HTTP/1.0\r\n{_header(port)}\r\n"
        answer = on(host, f"exec 3<>/dev/tcp/127.0.0.1/{port}; printf '{request}' >&3; cat <&3")
    _, _, body = answer.partition("\n\n")
    # Consul calls the JSON of an unhealthy answer plain text.
    return json.loads(body) if body[:1] in ("{", "[", '"') else body


def _header(port: int) -> str:
    """Consul's token of status.py. The command goes by standard input: no process list shows it."""
    if not knob("secure") or port != knobs.consul_http_port:
        return ""
    return rf"X-Consul-Token: {secrets.token(settings.SECRETS, 'consul-status')}\r\n"


# One request, read from standard input; with the host's own certificate, as any client of Nomad's.
NOMAD_TLS = (
    f"openssl s_client -quiet -verify_quiet -verify_return_error -connect 127.0.0.1:{knobs.nomad_http_port}"
    " -CAfile /etc/hashistack/ca.pem -cert /etc/nomad.d/nomad.pem -key /etc/nomad.d/nomad.key"
)


def nomad(host: str, method: str, path: str, body: str = "", token: str = "operator") -> str:
    """The whole answer of Nomad's API on a worker, from its status line on. token: as in tasks/nomad_acl.py;
    "" = none."""
    show = f"X-Nomad-Token: {secrets.token(settings.SECRETS, f'nomad-{token}')}\n" if token else ""
    request = f"{method} {path} HTTP/1.0\n{show}Content-Length: {len(body.encode())}\n\n{body}"
    return on(host, f"{NOMAD_TLS} <<'EOF'\n{request}\nEOF")


def power_off(*members: str) -> None:
    """Cut the power. Docker provider only."""
    for host in members:
        # A connection to a host that is gone would hang.
        subprocess.run(["ssh", "-F", str(SSH_CONFIG), "-O", "exit", host], capture_output=True)
    subprocess.run(["docker", "kill", *map(_container, members)], check=True, capture_output=True)


def power_on(*members: str) -> None:
    """Start what is off, and wait until SSH answers."""
    subprocess.run(["docker", "start", *map(_container, members)], check=True, capture_output=True)
    wait_for("SSH to answer", lambda: on_all(list(members), "true"))


def _container(host: str) -> str:
    return (ROOT / ".vagrant" / "machines" / host / "docker" / "id").read_text()


@contextmanager
def frozen_registries(*workers: str) -> Iterator[None]:
    """They take connections and never answer."""
    registry = "$(docker ps --quiet --filter name=registry)"  # with `secure` there are two
    on_all(list(workers), f"docker pause {registry}")
    try:
        yield
    finally:
        on_all(list(workers), f"docker unpause {registry}")
    wait_for("their checks to pass", whole)


@dataclass(frozen=True)
class Run:
    """A finished pyinfra run. changed: operation -> hosts that it changed."""

    code: int
    changed: dict[str, list[str]]
    failed: dict[str, list[str]]
    output: str

    def lines(self, pattern: str) -> list[str]:
        """The lines of its output that match, as they were printed."""
        return [line.strip() for line in self.output.splitlines() if re.search(pattern, line)]


def pyinfra(script: str, *arguments: str, **environment: str) -> Run:
    """`pyinfra -y inventory.py <script> <arguments>`, with the results that --json reports."""
    done = subprocess.run(
        [sys.executable, "-m", "pyinfra", "-y", "--json", "inventory.py", script, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYINFRA_YES": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    return Run(done.returncode, *_results(done.stdout), output=done.stderr + done.stdout)


def _results(stdout: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    changed: dict[str, list[str]] = {}
    failed: dict[str, list[str]] = {}
    for operation in json.loads(stdout)["results"]["operations"] if stdout.strip() else []:
        name = operation["name"]
        changed |= {name: operation["success"]} if operation["success"] else {}
        failed |= {name: operation["error"]} if operation["error"] else {}
    return changed, failed


def get(path: str) -> str:
    """GET a path of the app through HAProxy; raises on any status but 200."""
    with urllib.request.urlopen(URL + path, timeout=5) as answer:
        text: str = answer.read().decode()
        return text.strip()


def running_version() -> str:
    """The version that answers through HAProxy."""
    return get("/version").removeprefix("Version: ")


def consul_instances() -> set[str]:
    """The app's passing instances in Consul, as HAProxy names them: app-<version>-<address>-<port>."""
    entries = api(names("proxies")[0], knobs.consul_http_port, f"/v1/health/service/{knobs.app_name}?passing")
    services = [entry["Service"] for entry in entries]
    return {f"{s['Service']}-{s['Meta']['version']}-{s['Address']}-{s['Port']}" for s in services}


def haproxy_servers(proxy: str = "") -> dict[str, str]:
    """The app's servers in HAProxy on a proxy, the first by default -> UP, DOWN ..."""
    ask = "echo show stat | socat - UNIX-CONNECT:/run/haproxy/admin.sock"
    page = on(proxy or names("proxies")[0], ask).lstrip("# ")
    rows = [row for row in csv.DictReader(page.splitlines()) if row["pxname"] == knobs.app_name]
    return {row["svname"]: row["status"] for row in rows if row["svname"] not in ("FRONTEND", "BACKEND")}


def serving() -> set[str] | None:
    """The instances, once HAProxy has exactly those that pass in Consul and all of them are up."""
    servers = haproxy_servers()
    all_up = all(status.startswith("UP") for status in servers.values())
    return set(servers) if servers and all_up and set(servers) == consul_instances() else None


def whole() -> set[str] | None:
    """The instances that serve, once every server is a healthy voter, and every worker and check is well."""
    server = names("servers")[0]
    clusters = [knobs.consul_http_port, *([knobs.nomad_http_port] if SCHEDULER == "nomad" else [])]
    for port in clusters:
        health = api(server, port, "/v1/operator/autopilot/health")
        if not health["Healthy"] or len(health["Servers"]) != len(names("servers")):
            return None
    if api(server, knobs.consul_http_port, "/v1/health/state/critical"):
        return None
    if SCHEDULER == "nomad":
        nodes = api(server, knobs.nomad_http_port, "/v1/nodes")
        ready = [n for n in nodes if (n["Status"], n["SchedulingEligibility"]) == ("ready", "eligible")]
        if len(ready) != len(names("workers")):
            return None
    return serving()


def wait_for(what: str, check: Callable[[], Any], deadline_s: float = 60) -> Any:  # noqa: ANN401
    """Ask until the answer is true and give it back; fail once `deadline_s` has passed."""
    end = time.monotonic() + deadline_s
    problem: object = "never true"
    while time.monotonic() < end:
        try:
            if answer := check():
                return answer
        except (OSError, AssertionError, ValueError, TypeError) as error:
            problem = error
        time.sleep(0.3)
    raise AssertionError(f"{what}: not within {deadline_s:.0f} s ({problem})")
