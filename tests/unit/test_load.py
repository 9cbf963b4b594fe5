"""The load client against servers that misbehave: each lost or wrong answer must be counted."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.load import Answer, Load, Result

Handler = Callable[[socket.socket, str, bytes], bool]
"""Gets the connection, the request's path and body; True keeps the connection."""


def answer(body: bytes, status: str = "200 OK", extra: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


def right_answer(path: str, body: bytes, version: str = "0.0.2") -> bytes:
    first = {"/": "Hello from here!\n", "/status": "OK\n"}.get(path, f"Version: {version}\n")
    return answer(first.encode() + body)


def read_request(connection: socket.socket) -> tuple[str, bytes] | None:
    """Path and body of the next request, None at the end of the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := connection.recv(65536)):
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(h[15:]) for h in head.split(b"\r\n") if h.startswith(b"Content-Length:")), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head.split()[1].decode(), body


class Server:
    """Counts the requests that it reads and leaves each answer to `handler`."""

    def __init__(self, handler: Handler) -> None:
        self.handler, self.requests, self.lock = handler, 0, threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while request := read_request(connection):
                    with self.lock:
                        self.requests += 1
                    if not self.handler(connection, *request):
                        return
            except ConnectionError:
                return


@contextmanager
def serving(handler: Handler) -> Iterator[Server]:
    server = Server(handler)
    try:
        yield server
    finally:
        # Without the shutdown a thread in accept() would keep the port open.
        server.listener.shutdown(socket.SHUT_RDWR)
        server.listener.close()


def run(url: str, requests: int, **options: object) -> Result:
    """Load until so many requests were sent."""
    load = Load(url, rate=1000, **options)  # type: ignore[arg-type]
    with load:
        deadline = time.monotonic() + 10
        while load.result.sent < requests and time.monotonic() < deadline:
            load.stopped.wait(0.005)
    assert load.result.sent == load.result.ok + load.result.failed
    assert load.result.sent >= requests
    return load.result


def test_a_right_server_has_no_failures_and_sees_each_request_once() -> None:
    def handler(connection: socket.socket, path: str, body: bytes) -> bool:
        connection.sendall(right_answer(path, body))
        return True

    with serving(handler) as server:
        result = run(server.url, 200, versions={"0.0.2"})
    assert result.failed == 0, result
    assert result.sent == server.requests
    assert set(result.versions) == {"0.0.2"}


@pytest.mark.parametrize("path", ["/version", "/echo"])
def test_a_swallowed_request_fails_once_on_new_and_on_kept_connections(path: str) -> None:
    """The server reads some requests and closes: a client that sends one again would hide that."""
    lock, swallowed = threading.Lock(), 0

    def handler(connection: socket.socket, asked: str, body: bytes) -> bool:
        nonlocal swallowed
        with lock:
            if asked == path and swallowed < 20:
                swallowed += 1
                return False
        connection.sendall(right_answer(asked, body))
        return True

    with serving(handler) as server:
        result = run(server.url, 400)
    assert result.kinds == {"closed without an answer": 20}, result
    assert server.requests == result.sent


def test_a_request_swallowed_on_a_kept_connection_is_not_sent_again() -> None:
    served = threading.local()

    def handler(connection: socket.socket, path: str, body: bytes) -> bool:
        served.count = getattr(served, "count", 0) + 1
        if served.count == 2:
            return False
        connection.sendall(right_answer(path, body))
        return True

    with serving(handler) as server:
        result = run(server.url, 20, threads=1)
    assert set(result.kinds) == {"closed without an answer"}, result
    assert result.failed == result.sent // 2 == server.requests // 2
    assert "kept connection" in result.examples["closed without an answer"][0]


def test_a_connection_closed_while_idle_is_replaced_and_is_no_failure() -> None:
    def handler(connection: socket.socket, path: str, body: bytes) -> bool:
        connection.sendall(right_answer(path, body))
        return False

    with serving(handler) as server:
        load = Load(server.url, rate=10, threads=1)
        with load:
            while load.result.sent < 10:
                load.stopped.wait(0.005)
    assert load.result.failed == 0, load.result
    assert load.result.idle_closed >= 8
    assert server.requests == load.result.sent


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (answer(b"Version: 0.0.2\nsomething else"), "wrong body"),
        (answer(b""), "wrong body"),
        (answer(b"no server", "503 Service Unavailable"), "status 503"),
        (answer(b"", "302 Found", "Location: /\r\n"), "status 302"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nVersion", "answer cut short"),
        (b"nonsense\r\n\r\n", "BadStatusLine"),
    ],
)
def test_a_wrong_answer_is_counted(reply: bytes, kind: str) -> None:
    def handler(connection: socket.socket, path: str, body: bytes) -> bool:
        connection.sendall(reply)
        return False

    with serving(handler) as server:
        result = run(server.url, 20)
    assert result.ok == 0
    assert set(result.kinds) == {kind}, result


def test_a_version_that_should_not_answer_is_counted() -> None:
    def handler(connection: socket.socket, path: str, body: bytes) -> bool:
        connection.sendall(right_answer(path, body, version="0.0.1"))
        return True

    with serving(handler) as server:
        result = run(server.url, 40, versions={"0.0.2", "0.0.3"})
    assert result.kinds["wrong version"] == result.failed > 0, result
    assert "0.0.1" in result.examples["wrong version"][0]


def test_no_answer_in_time_is_counted() -> None:
    def handler(connection: socket.socket, path: str, body: bytes) -> bool:
        connection.recv(1)
        return False

    with serving(handler) as server:
        result = run(server.url, 4, threads=4, timeout=0.2)
    assert set(result.kinds) == {"timeout"}, result


def test_an_answer_that_drips_past_the_timeout_is_counted() -> None:
    def handler(connection: socket.socket, path: str, body: bytes) -> bool:
        never = threading.Event()
        for byte in right_answer(path, body):
            connection.sendall(bytes([byte]))
            never.wait(0.01)
        return True

    with serving(handler) as server:
        result = run(server.url, 4, threads=4, timeout=0.2)
    assert set(result.kinds) == {"timeout"}, result


def test_nobody_listening_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = run(f"http://127.0.0.1:{port}", 20)
    assert set(result.kinds) == {"connection refused"}, result


def test_the_rate_is_held() -> None:
    def handler(connection: socket.socket, path: str, body: bytes) -> bool:
        connection.sendall(right_answer(path, body))
        return True

    with serving(handler) as server:
        load = Load(server.url, rate=50)
        with load:
            while load.result.sent < 50:
                load.stopped.wait(0.005)
    assert 40 <= load.result.sent / load.result.seconds <= 55


def test_each_answer_is_told() -> None:
    def handler(connection: socket.socket, path: str, body: bytes) -> bool:
        connection.sendall(right_answer(path, body))
        return path != "/echo"

    told: list[Answer] = []
    with serving(handler) as server:
        result = run(server.url, 60, versions={"0.0.3"}, tell=told.append)
    assert len(told) == result.sent
    assert sum(a.failure is not None for a in told) == result.failed > 0
    assert {a.method for a in told} == {"GET", "POST"}
    assert {a.connection for a in told} == {"kept", "new"}
    assert [a.start for a in told if a.start < 0 or a.seconds < 0] == []


@pytest.mark.parametrize(
    "url", ["http://example.com", "http://8.8.8.8", "https://127.0.0.1", "http://192.168.64.1", "x"]
)
def test_other_targets_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="may be put under load"):
        Load(url)
