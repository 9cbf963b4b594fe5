"""haproxy-apply against a real HAProxy on loopback, with a `systemctl` that does what systemd's does."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not (shutil.which("haproxy") and shutil.which("socat")), reason="haproxy or socat not installed"
)
SCRIPT = Path("templates/haproxy/haproxy-apply").resolve()
DEADLINE_S = 30

# `reload` succeeds as soon as the signal is sent, as with Debian's unit.
SYSTEMCTL = """#!/bin/sh
cd "$(dirname "$0")" || exit 1
echo "$*" >>calls
alive() { [ -s pid ] && [ -e "/proc/$(cat pid)/exe" ]; }  # a zombie has no exe
case $1 in
is-active) alive ;;
reload) kill -USR2 "$(cat pid)" ;;
start)
    ulimit -n 1000
    setsid haproxy -Ws -f haproxy.cfg -S "$PWD/master.sock" >>log 2>&1 &
    echo $! >pid
    for _ in $(seq 300); do
        echo '@1 show info' | socat - UNIX-CONNECT:master.sock 2>/dev/null | grep -q Pid && exit 0
        alive || exit 1
        sleep 0.1
    done
    exit 1
    ;;
esac
"""


class Proxy:
    """A folder with HAProxy's live file, spool and state, and the port that HAProxy listens on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.live = folder / "haproxy.cfg"
        self.spool = folder / "spool" / "haproxy.cfg"
        self.pending = folder / "state" / "pending.cfg"
        self.fault = folder / "state" / "fault"
        self.spool.parent.mkdir()
        self.pending.parent.mkdir()
        systemctl = folder / "systemctl"
        systemctl.write_text(SYSTEMCTL)
        systemctl.chmod(0o755)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    def config(self, servers: int, extra: str = "") -> str:
        lines = [f"    server s{n} 127.0.0.1:{n}" for n in range(1, servers + 1)]
        return "\n".join(
            [
                "global",
                f"    {extra}",
                "defaults",
                "    mode http",
                "    timeout connect 1s",
                "    timeout client 1s",
                "    timeout server 1s",
                "    retries 0",
                "frontend http",
                f"    bind 127.0.0.1:{self.port}",
                "    default_backend app",
                "backend app",
                *lines,
                "",
            ]
        )

    def apply(self, candidate: str | None = None) -> subprocess.CompletedProcess[str]:
        if candidate is not None:
            self.spool.write_text(candidate)
        return subprocess.run(
            [SCRIPT],
            env={
                "PATH": f"{self.folder}:{os.environ['PATH']}:/usr/sbin",
                "HAPROXY_SPOOL": str(self.spool),
                "HAPROXY_STATE": str(self.pending.parent),
                "HAPROXY_LIVE": str(self.live),
                "HAPROXY_MASTER": str(self.folder / "master.sock"),
                "HAPROXY_DEADLINE_S": str(DEADLINE_S),
            },
            capture_output=True,
            text=True,
            timeout=4 * DEADLINE_S,
        )

    def calls(self, verb: str) -> int:
        return (self.folder / "calls").read_text().split().count(verb)

    def worker(self) -> str:
        ask = ["socat", "-", f"UNIX-CONNECT:{self.folder / 'master.sock'}"]
        answer = subprocess.run(ask, input="@1 show info\n", capture_output=True, text=True, check=True)
        return next(line for line in answer.stdout.splitlines() if line.startswith("Pid: "))

    def serves(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return client.recv(100).startswith(b"HTTP/1.")

    def master(self) -> int:
        return int((self.folder / "pid").read_text())

    def kill(self) -> None:
        """End the master and its workers at once."""
        os.killpg(self.master(), signal.SIGKILL)
        end = time.monotonic() + DEADLINE_S
        while Path(f"/proc/{self.master()}/exe").exists():
            assert time.monotonic() < end, "HAProxy does not end"
            time.sleep(0.02)


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    """HAProxy with two servers, put in place by the script itself."""
    proxy = Proxy(tmp_path)
    proxy.live.write_text("# the package's file\n")
    first = proxy.apply(proxy.config(servers=2))
    assert first.returncode == 0, first.stderr
    yield proxy
    proxy.kill()


def test_a_good_candidate_is_live_and_a_new_worker_runs(proxy: Proxy) -> None:
    before = proxy.worker()
    result = proxy.apply(proxy.config(servers=3))
    assert result.returncode == 0, result.stderr
    assert proxy.live.read_text() == proxy.config(servers=3)
    assert proxy.worker() != before
    assert proxy.calls("start") == 1, "HAProxy was restarted"
    assert not proxy.pending.exists() and not proxy.spool.exists() and not proxy.fault.exists()


def test_an_identical_candidate_does_not_reload(proxy: Proxy) -> None:
    before = proxy.worker()
    assert proxy.apply(proxy.config(servers=2)).returncode == 0
    assert (proxy.worker(), proxy.calls("reload")) == (before, 0)


def test_an_invalid_candidate_is_refused(proxy: Proxy) -> None:
    before = proxy.worker()
    result = proxy.apply(proxy.config(servers=2, extra="no-such-keyword"))
    assert result.returncode == 3
    assert "no-such-keyword" in proxy.fault.read_text()
    assert "no-such-keyword" in proxy.pending.read_text()
    assert proxy.live.read_text() == proxy.config(servers=2)
    assert (proxy.worker(), proxy.calls("reload")) == (before, 0)


def test_servers_are_never_replaced_by_none(proxy: Proxy) -> None:
    result = proxy.apply(proxy.config(servers=0))
    assert result.returncode == 3
    assert "no servers" in proxy.fault.read_text()
    assert proxy.live.read_text() == proxy.config(servers=2)
    assert proxy.apply(proxy.config(servers=2)).returncode == 0
    assert not proxy.fault.exists() and not proxy.pending.exists()


def test_a_dead_worker_is_noticed_and_the_old_configuration_is_back(proxy: Proxy) -> None:
    result = proxy.apply(proxy.config(servers=3, extra="maxconn 20000"))
    assert result.returncode == 1
    assert proxy.calls("reload") == 2, "once with the new file, once back to the old one"
    assert "no new worker" in proxy.fault.read_text()
    assert proxy.live.read_text() == proxy.config(servers=2)
    assert "maxconn 20000" in proxy.pending.read_text()
    assert proxy.serves()
    assert proxy.calls("start") == 1


def test_a_worker_that_takes_all_down_is_replaced_by_the_old_configuration(proxy: Proxy) -> None:
    """A worker that dies late, here because it cannot enter its chroot: HAProxy ends, or it hangs."""
    if os.geteuid() != 0:
        pytest.skip("only root may chroot")
    result = proxy.apply(proxy.config(servers=3, extra="chroot /no/such/folder"))
    assert result.returncode == 1
    assert proxy.live.read_text() == proxy.config(servers=2)
    assert proxy.serves()


def test_a_failed_candidate_is_tried_again(proxy: Proxy) -> None:
    proxy.apply(proxy.config(servers=3, extra="maxconn 20000"))
    proxy.pending.write_text(proxy.config(servers=3))
    assert proxy.apply().returncode == 0
    assert proxy.live.read_text() == proxy.config(servers=3)
    assert not proxy.fault.exists()


def test_haproxy_is_started_when_it_does_not_run(proxy: Proxy) -> None:
    proxy.kill()
    assert proxy.apply(proxy.config(servers=2)).returncode == 0
    assert proxy.serves()


def test_a_run_that_was_cut_off_begins_again(proxy: Proxy) -> None:
    """Cut off after the swap: the new file is live, nobody knows whether HAProxy can run with it."""
    shutil.copy(proxy.live, f"{proxy.live}.previous")
    unverified = proxy.config(servers=3, extra="maxconn 20000")
    proxy.live.write_text(unverified)
    proxy.pending.write_text(unverified)
    assert proxy.apply().returncode == 1
    assert proxy.live.read_text() == proxy.config(servers=2)
    assert proxy.serves()


def test_a_write_that_fails_leaves_the_live_file(proxy: Proxy) -> None:
    (proxy.folder / "haproxy.cfg.new").mkdir()
    result = proxy.apply(proxy.config(servers=3))
    assert result.returncode == 1
    assert proxy.live.read_text() == proxy.config(servers=2)
    assert proxy.calls("reload") == 0


def test_a_live_file_that_was_removed_is_replaced(proxy: Proxy) -> None:
    proxy.live.unlink()
    assert proxy.apply(proxy.config(servers=2)).returncode == 0
    assert proxy.live.read_text() == proxy.config(servers=2)
