"""The lab, as its tests use it: hosts over SSH, pyinfra runs, and waiting on a condition."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import inventory
from lab import settings

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
    if "ssh_config_file" in next(iter(HOSTS.values())):
        SSH_CONFIG.write_text(f"Include {next(iter(HOSTS.values()))['ssh_config_file']}\n")
        return
    SSH_CONFIG.write_text(
        "".join(
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
    )


def testinfra(*groups: str) -> list[str]:
    """What `testinfra_hosts` takes, for the hosts of these groups."""
    write_ssh_config()
    members = dict.fromkeys(name for group in groups for name in names(group))
    return [f"ssh://{name}?ssh_config={SSH_CONFIG}&sudo=true" for name in members]


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


@dataclass(frozen=True)
class Run:
    """A finished pyinfra run. changed: operation -> hosts that it changed."""

    code: int
    changed: dict[str, list[str]]
    failed: dict[str, list[str]]
    output: str


def pyinfra(script: str, *arguments: str) -> Run:
    """`pyinfra -y inventory.py <script> <arguments>`, with the results that --json reports."""
    done = subprocess.run(
        [sys.executable, "-m", "pyinfra", "-y", "--json", "inventory.py", script, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYINFRA_YES": "1"},
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


def wait_for(what: str, check: Callable[[], Any], deadline_s: float = 60) -> Any:
    """Ask until the answer is true and give it back; fail once `deadline_s` has passed."""
    end = time.monotonic() + deadline_s
    problem: object = "never true"
    while time.monotonic() < end:
        try:
            if answer := check():
                return answer
        except (OSError, AssertionError, ValueError) as error:
            problem = error
        time.sleep(0.3)
    raise AssertionError(f"{what}: not within {deadline_s:.0f} s ({problem})")
