"""Watches the servers' leaders and HAProxy's backend while something is done to the hosts."""

from __future__ import annotations

import shlex
import subprocess
import threading
from types import TracebackType
from typing import NamedTuple

from group_data import all as knobs
from tests.lab import hosts

PORTS = {"consul": knobs.consul_http_port} | (
    {"nomad": knobs.nomad_http_port} if hosts.SCHEDULER == "nomad" else {}
)
# Both end with their standard input, and print a line for each change: time, what, what it says.
_LEADERS = r"""
declare -A last
while read -t 0.1 -r _; [ $? -gt 128 ]; do
    for service in SERVICES; do
        says=$( (exec 3<>/dev/tcp/127.0.0.1/${service#*:} || { echo down; exit; }
            case $service in
                TLS) printf 'GET /v1/status/leader HTTP/1.0\r\n\r\n' | OPENSSL | tail -n 1 ;;
                *) printf 'GET /v1/status/leader HTTP/1.0\r\n\r\n' >&3; tail -n 1 <&3 ;;
            esac) 2>/dev/null)
        [ "$says" = "${last[$service]-}" ] || echo "$EPOCHREALTIME ${service%:*} ${says:-nothing}"
        last[$service]=$says
    done
done
""".replace("SERVICES", " ".join(f"{name}:{port}" for name, port in PORTS.items()))
_LEADERS = _LEADERS.replace("TLS", "nomad:*" if hosts.knob("secure") else "none").replace(
    "OPENSSL", hosts.NOMAD_TLS
)
_BACKEND = r"""
while read -t 0.1 -r _; [ $? -gt 128 ]; do
    says=$(grep -c '^ *server ' /etc/haproxy/haproxy.cfg)
    [ "$says" = "$last" ] || echo "$EPOCHREALTIME backend $says"
    last=$says
done
"""


class Change(NamedTuple):
    """time in s; what: consul, nomad, backend; says: "down", a quoted leader, how many servers, or else."""

    time: float
    what: str
    host: str
    says: str


class Watch:
    """From entering its `with` block to leaving it."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self._loops: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> Watch:
        for host in hosts.names("servers"):
            self._start(host, _LEADERS)
        self._start(hosts.names("proxies")[0], _BACKEND)
        expected = len(PORTS) * len(hosts.names("servers")) + 1
        hosts.wait_for("the first answers", lambda: len(self.changes) == expected)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        for loop in self._loops:
            assert loop.stdin
            loop.stdin.close()
        for reader in self._readers:
            reader.join()

    def _start(self, host: str, script: str) -> None:
        loop = subprocess.Popen(
            ["ssh", "-F", str(hosts.SSH_CONFIG), host, f"sudo bash -c {shlex.quote(script)}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._loops.append(loop)
        self._readers.append(threading.Thread(target=self._read, args=(host, loop)))
        self._readers[-1].start()

    def _read(self, host: str, loop: subprocess.Popen[str]) -> None:
        assert loop.stdout
        for line in loop.stdout:
            time, what, says = line.split(maxsplit=2)
            self.changes.append(Change(float(time), what, host, says.strip()))

    def stops(self, service: str) -> list[str]:
        """The servers that went down, in order. Fails if one did while the cluster was not whole: a leader
        takes a moment to stop, so what counts is what all said 2 s before."""
        mine = sorted(change for change in self.changes if change.what == service)
        stops = [change for change in mine if change.says == "down"]
        for stop in stops:
            said = {c.host: c.says for c in mine if c.time < stop.time - 2}
            whole = len(set(said.values())) == 1 and said[stop.host].startswith('"1')
            assert whole, f"{service} on {stop.host} was stopped while {said}"
        return [stop.host for stop in stops]

    def fewest_servers(self) -> int:
        """The shortest that HAProxy's backend was."""
        return min(int(change.says) for change in self.changes if change.what == "backend")
