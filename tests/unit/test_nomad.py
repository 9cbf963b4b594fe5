"""Nomad becomes encrypted: what runs without, and who must take part when all restart together."""

from __future__ import annotations

import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from tasks import nomad


class Answers(BaseHTTPRequestHandler):
    """As a Nomad without TLS and without a leader (500), or one with TLS (400)."""

    code = 500

    def do_GET(self) -> None:
        self.send_response(self.code)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("code", "plain"), [(500, True), (200, True), (400, False), (None, False)])
def test_what_answers_without_tls_is_plain(code: int | None, plain: bool) -> None:
    with HTTPServer(("127.0.0.1", 0), type("Handler", (Answers,), {"code": code})) as server:
        port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fact = nomad.Plain()
        command = fact.command("127.0.0.1", port if code else 1)
        ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
        server.shutdown()
    assert ran.returncode == 0
    assert fact.process(ran.stdout.splitlines()) is plain


@pytest.fixture
def restarted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The workers that were restarted; three of them make the cluster."""
    done: list[str] = []
    workers = [SimpleNamespace(name=f"worker-{n:02d}") for n in (1, 2, 3)]
    monkeypatch.setattr(nomad, "inventory", SimpleNamespace(get_group=lambda name: workers))
    monkeypatch.setattr(nomad.rolling, "members", lambda group: workers)
    monkeypatch.setattr(nomad.rolling, "run", lambda member, unit: done.append(member.name))
    monkeypatch.setattr(nomad.lock, "fault", lambda: None)
    return done


HOST = SimpleNamespace(print_prefix="[worker-01] ")


def restart(names: list[str]) -> bool:
    members = [SimpleNamespace(name=name) for name in names]
    return nomad._restart_together(None, HOST, members)  # type: ignore[arg-type]


def test_all_that_are_plain_restart_and_it_says_so(
    restarted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert restart(["worker-01", "worker-02", "worker-03"])
    assert sorted(restarted) == ["worker-01", "worker-02", "worker-03"]
    assert "it restarts together on worker-01, worker-02, worker-03, once" in caplog.text


def test_without_one_of_the_workers_none_restarts(
    restarted: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nomad.rolling, "members", lambda group: [])
    assert not restart(["worker-01"])
    assert restarted == []
    assert "worker-01, worker-02, worker-03: not in this run, and could not talk" in caplog.text


def test_a_lost_lock_lets_none_restart(restarted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nomad.lock, "fault", lambda: "the lock was lost")
    assert not restart(["worker-01"])
    assert restarted == []


def test_one_that_does_not_start_again_is_named(
    restarted: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nomad.rolling, "run", lambda member, unit: f"systemctl restart {unit}: failed")
    assert not restart(["worker-01"])
    assert "Nomad: systemctl restart nomad: failed" in caplog.text
