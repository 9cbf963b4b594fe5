"""Steady load on the app that cannot flatter: every answer is checked and no request is sent twice.

    python tests/load.py http://127.0.0.1:8080 --seconds 60 --rate 160 --version 0.0.2

or, around what is to be tested:

    with Load("http://127.0.0.1:8080", versions={"0.0.2", "0.0.3"}) as load:
        ...
    assert load.result.failed == 0, load.result

Half of the threads keep their connection, half open one for each request; GET and POST alternate.
A request that gets no answer has failed, also on a connection kept from the request before. Only
before a request is sent is a kept connection looked at: if the server has closed it by then, as it
may, a new one is opened.
"""

from __future__ import annotations

import argparse
import http.client
import ipaddress
import os
import re
import select
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple
from urllib.parse import urlsplit

ALLOWED = [ipaddress.ip_network(net) for net in ("127.0.0.0/8", "192.168.56.0/21")]
EXAMPLES = 3  # kept for each kind of failure
VERSION = re.compile(rb"Version: (\S+)\n")


class Failure(Exception):
    """A request that was not answered as it should be: its kind, and what was seen."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class Answer(NamedTuple):
    """What became of one request. start: seconds since the load began; seconds: until it had ended."""

    start: float
    seconds: float
    method: str
    connection: str  # kept or new
    version: str | None  # that answered, where the answer tells
    failure: str | None  # its kind


@dataclass
class Result:
    """Counts of requests. latency and seconds in seconds; idle_closed counts connections."""

    sent: int = 0
    ok: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    versions: Counter[str] = field(default_factory=Counter)
    idle_closed: int = 0
    max_latency: float = 0.0
    seconds: float = 0.0

    @property
    def failed(self) -> int:
        return self.kinds.total()

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {count}" for name, count in sorted(self.versions.items()))
        lines = [
            f"{self.sent} sent in {self.seconds:.1f} s, {self.ok} ok, {self.failed} failed, "
            f"slowest {self.max_latency * 1000:.0f} ms, versions: {versions or 'none'}, "
            f"{self.idle_closed} idle connections closed by the server"
        ]
        for kind, count in self.kinds.most_common():
            lines += [f"  {count} x {kind}"] + [f"      {line}" for line in self.examples[kind]]
        return "\n".join(lines)


class Load:
    """Load in the background, from start() to stop(), or for as long as a `with` block runs.

    url: http://<address>:<port>, loopback or the lab's network only. rate: requests per second, at
    most; fewer when all threads wait for answers. versions: those that may answer, None for any.
    timeout: seconds for a whole request. tell: gets each Answer, in one thread at a time.
    """

    def __init__(
        self,
        url: str,
        rate: float = 160,
        versions: Iterable[str] | None = None,
        threads: int = 16,
        timeout: float = 10,
        tell: Callable[[Answer], object] = lambda answer: None,
    ) -> None:
        self.address = _target(url)
        self.gap, self.threads, self.timeout = 1 / rate, threads, timeout
        self.versions = None if versions is None else frozenset(versions)
        self.result, self.tell = Result(), tell
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self._pool = ThreadPoolExecutor(threads, "load")

    def start(self) -> None:
        self._begin = self._due = time.monotonic()
        self._running = [self._pool.submit(self._thread, n) for n in range(self.threads)]

    def stop(self) -> Result:
        """Let each thread finish its request, and return the counts."""
        self.stopped.set()
        for thread in self._running:
            thread.result()  # raises what a thread died of
        self._pool.shutdown()
        return self.result

    def __enter__(self) -> Load:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.stop()

    def _thread(self, number: int) -> None:
        client = _Client(self.address, self.timeout, keep=number % 2 == 0)
        count = 0
        while self._wait_for_turn():
            count += 1
            # Each path comes with POST in between, whichever thread's turn it is.
            path = "/echo" if count % 2 else ("/", "/version", "/status")[count // 2 % 3]
            body = f"{number} {count} {os.urandom(16).hex()}".encode() if path == "/echo" else None
            self._request(client, path, body)
        client.close()

    def _wait_for_turn(self) -> bool:
        """Wait until the next request is due, for all threads together; False when stopped."""
        with self.lock:
            due = max(self._due, time.monotonic())
            self._due = due + self.gap
        return not self.stopped.wait(max(0.0, due - time.monotonic()))

    def _request(self, client: _Client, path: str, body: bytes | None) -> None:
        start, failure, version = time.monotonic(), None, None
        with self.lock:
            self.result.sent += 1
        try:
            version = _check(path, body, client.ask(path, body), self.versions)
            if time.monotonic() - start > self.timeout:
                raise Failure("timeout", "answered, but too late")
        except Failure as error:
            failure = error
            client.close()
        self._count(client, path, start, failure, version)

    def _count(
        self, client: _Client, path: str, start: float, failure: Failure | None, version: str | None
    ) -> None:
        now = time.monotonic()
        method = "POST" if path == "/echo" else "GET"
        answer = Answer(
            start - self._begin,
            now - start,
            method,
            client.connection.split()[0],
            version,
            failure.kind if failure else None,
        )
        with self.lock:
            self.tell(answer)
            result = self.result
            result.max_latency = max(result.max_latency, now - start)
            result.seconds = now - self._begin
            result.idle_closed, client.idle_closed = result.idle_closed + client.idle_closed, 0
            if version:
                result.versions[version] += 1
            if failure is None:
                result.ok += 1
                return
            result.kinds[failure.kind] += 1
            examples = result.examples.setdefault(failure.kind, [])
            if len(examples) < EXAMPLES:
                examples.append(
                    f"at {start - self._begin:.2f} s, after {now - start:.3f} s: {method} {path}, "
                    f"{client.connection}: {failure.detail}"
                )


class _Client:
    """One connection at a time; ask() sends a request once and returns its answer or raises."""

    def __init__(self, address: tuple[str, int], timeout: float, keep: bool) -> None:
        self.address, self.timeout, self.keep = address, timeout, keep
        self.http: http.client.HTTPConnection | None = None
        self.idle_closed = 0
        self.connection = "new connection"

    def close(self) -> None:
        if self.http:
            self.http.close()
        self.http = None

    def ask(self, path: str, body: bytes | None) -> bytes:
        try:
            http_ = self._connected()
            headers = {} if self.keep else {"Connection": "close"}
            http_.request("POST" if body is not None else "GET", path, body, headers)
            answer = http_.getresponse()
            content = answer.read()
        except TimeoutError as error:
            raise Failure("timeout", str(error)) from error
        except http.client.IncompleteRead as error:
            raise Failure("answer cut short", str(error)) from error
        except ConnectionRefusedError as error:
            raise Failure("connection refused", str(error)) from error
        except (ConnectionError, http.client.RemoteDisconnected) as error:
            raise Failure("closed without an answer", str(error)) from error
        except (OSError, http.client.HTTPException) as error:
            raise Failure(type(error).__name__, str(error)) from error
        if not self.keep or answer.will_close:
            self.close()
        if answer.status != http.HTTPStatus.OK:
            raise Failure(f"status {answer.status}", repr(content[:100]))
        return content

    def _connected(self) -> http.client.HTTPConnection:
        """The kept connection if the server has not closed it while nothing was asked, or a new."""
        if self.http and _closed_by_server(self.http.sock):
            self.idle_closed += 1
            self.close()
        self.connection = "kept connection" if self.http else "new connection"
        if not self.http:
            self.http = http.client.HTTPConnection(*self.address, timeout=self.timeout)
            self.http.connect()
        return self.http


def _closed_by_server(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if not poll.poll(0):
        return False
    try:
        unasked = sock.recv(1, socket.MSG_PEEK)
    except ConnectionError:
        return True
    if unasked:
        raise Failure("bytes that nobody asked for")
    return True


def _check(path: str, body: bytes | None, answer: bytes, versions: frozenset[str] | None) -> str | None:
    """Raise Failure unless the answer is the one to this request; the version, if it tells one."""
    if path == "/":
        right = re.fullmatch(rb"Hello from \S+!\n", answer) is not None
    elif path == "/status":
        right = answer == b"OK\n"
    else:
        found = VERSION.match(answer)
        if found is None or answer[found.end() :] != (body or b""):
            raise Failure("wrong body", repr(answer[:100]))
        version = found[1].decode(errors="replace")
        if versions is not None and version not in versions:
            raise Failure("wrong version", version)
        return version
    if not right:
        raise Failure("wrong body", repr(answer[:100]))
    return None


def _target(url: str) -> tuple[str, int]:
    """Address and port of http://<address>:<port>; ValueError for one that is not ours to load."""
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname or ""
    try:
        allowed = any(ipaddress.ip_address(host) in net for net in ALLOWED)
    except ValueError:
        allowed = False
    if parts.scheme != "http" or not allowed:
        nets = ", ".join(map(str, ALLOWED))
        raise ValueError(f"{url}: only http:// to {nets} may be put under load")
    return host, parts.port or 80


def main() -> int:
    parser = argparse.ArgumentParser(description="Put the app under load and check every answer.")
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rate", type=float, default=160, help="requests per second")
    parser.add_argument("--version", action="append", help="that may answer; repeat; default any")
    parser.add_argument("--timeout", type=float, default=10, help="seconds for a request")
    args = parser.parse_args()
    try:
        load = Load(args.url, args.rate, args.version, timeout=args.timeout)
    except ValueError as error:
        sys.exit(str(error))
    end = time.monotonic() + args.seconds
    with load:
        try:
            while (left := end - time.monotonic()) > 0:
                time.sleep(min(5.0, left))
                with load.lock:
                    print(str(load.result).splitlines()[0], file=sys.stderr)
        except KeyboardInterrupt:
            pass
    print(load.result)
    return 0 if load.result.ok and not load.result.failed else 1


if __name__ == "__main__":
    sys.exit(main())
