"""Watches what each server says of its leader, while something is done to the servers."""

from __future__ import annotations

import shlex
import subprocess
import threading
from types import TracebackType

from group_data import all as knobs
from tests.lab import hosts

PORTS = {"consul": knobs.consul_http_port} | (
    {"nomad": knobs.nomad_http_port} if hosts.SCHEDULER == "nomad" else {}
)
DOWN = "down"
# Ends with its standard input. A line for each change: time, service, what it says.
_LOOP = """
declare -A last
while read -t 0.1 -r _; [ $? -gt 128 ]; do
    for service in %s; do
        name=${service%%:*}
        says=$( (exec 3<>/dev/tcp/127.0.0.1/${service#*:} || { echo down; exit; }
            printf 'GET /v1/status/leader HTTP/1.0\\r\\n\\r\\n' >&3; tail -n 1 <&3) 2>/dev/null)
        [ "$says" = "${last[$name]-}" ] || echo "$EPOCHREALTIME $name ${says:-nothing}"
        last[$name]=$says
    done
done
""" % " ".join(f"{name}:{port}" for name, port in PORTS.items())


class Watch:
    """changes: time (s), service, server and what it says: "down", '"<leader's address>:<port>"', or else."""

    def __init__(self) -> None:
        self.changes: list[tuple[float, str, str, str]] = []
        self._loops: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> Watch:
        for server in hosts.names("servers"):
            command = f"bash -c {shlex.quote(_LOOP)}"
            loop = subprocess.Popen(
                ["ssh", "-F", str(hosts.SSH_CONFIG), server, command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._loops.append(loop)
            self._readers.append(threading.Thread(target=self._read, args=(server, loop)))
        for reader in self._readers:
            reader.start()
        hosts.wait_for("the first leaders", lambda: len(self.changes) == len(PORTS) * len(self._loops))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        for loop in self._loops:
            assert loop.stdin
            loop.stdin.close()
        for reader in self._readers:
            reader.join()

    def _read(self, server: str, loop: subprocess.Popen[str]) -> None:
        assert loop.stdout
        for line in loop.stdout:
            time, service, says = line.split(maxsplit=2)
            self.changes.append((float(time), service, server, says.strip()))

    def stops(self, service: str) -> list[str]:
        """The servers that went down, in order; fails if one did while another did not know a leader."""
        says: dict[str, str] = {}
        stopped = []
        for time, _, server, now in sorted(c for c in self.changes if c[1] == service):
            if now == DOWN:
                others = {name: said for name, said in says.items() if name != server}
                assert all(said.startswith('"1') for said in others.values()), f"{time}: {server} of {others}"
                stopped.append(server)
            says[server] = now
        return stopped
