"""The cluster's APIs from the controller: python-consul2 and python-nomad through pyinfra's own SSH.

Nothing but SSH has to reach the hosts: the APIs listen on their loopback, and a forward goes through
the connection that pyinfra has opened, so it obeys the same keys, jump hosts and known hosts.
"""

from __future__ import annotations

import json
import logging
import os
import socketserver
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import consul
import nomad
import requests
from paramiko import SSHException
from paramiko.channel import Channel
from paramiko.transport import Transport
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.host import Host

from tasks import secrets

# Both clients let these variables override their arguments: a stray one would address another cluster.
for _name in [name for name in os.environ if name.startswith(("CONSUL_", "NOMAD_"))]:
    del os.environ[_name]

# Refused connections are answers here; paramiko's lines about them would stand among the run's.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

TIMEOUT_S = 10
# What an API call may raise while an agent restarts or a leader is elected.
Unavailable = (
    consul.ConsulException,
    nomad.api.exceptions.BaseNomadException,
    requests.RequestException,
    SSHException,
    ConnectError,  # pyinfra's, to a host outside this run
    OSError,
    json.JSONDecodeError,  # python-consul2: "No cluster leader" is plain text
)


class _Forward(socketserver.ThreadingTCPServer):
    """A listener on a free loopback port whose connections end at `target`, seen from the host."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, transport: Transport, target: tuple[str, int]) -> None:
        self.transport, self.target = transport, target
        super().__init__(("127.0.0.1", 0), _Connection)


class _Connection(socketserver.BaseRequestHandler):
    server: _Forward

    def handle(self) -> None:
        try:
            channel = self.server.transport.open_channel(
                "direct-tcpip", self.server.target, self.request.getpeername(), timeout=TIMEOUT_S
            )
        except (SSHException, OSError, EOFError):
            return  # nothing listens there: the caller sees a closed connection
        with channel:
            upload = Thread(target=_copy, args=(self.request.recv, channel), daemon=True)
            upload.start()
            _download(channel, self.request.sendall)


def _copy(receive: Callable[[int], bytes], channel: Channel) -> None:
    try:
        while data := receive(65536):
            channel.sendall(data)
        channel.shutdown_write()
    except OSError:
        channel.close()


def _download(channel: Channel, send: Callable[[bytes], None]) -> None:
    try:
        while data := channel.recv(65536):
            send(data)
    except OSError:
        pass  # the local side went away; `with channel` closes the other


@contextmanager
def forward(host: Host, port: int, address: str = "127.0.0.1") -> Iterator[int]:
    """A local port that leads to `address:port` as `host` sees it."""
    if not host.connected:
        host.connect(raise_exceptions=True)
    transport = host.connector.client.get_transport()  # type: ignore[attr-defined]
    with _Forward(transport, (address, port)) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


@contextmanager
def http_session() -> Iterator[requests.Session]:
    """Its connections end with it: the agents allow 100 to 200 from one address. No proxy leads to us."""
    with requests.Session() as session:
        session.trust_env = False
        yield session


@contextmanager
def consul_api(host: Host) -> Iterator[consul.Consul]:
    """python-consul2 against the agent on `host`."""
    with (
        forward(host, host.data.consul_http_port, host.data.consul_http_address) as port,
        http_session() as web,
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            client = consul.Consul(host="127.0.0.1", port=port, timeout=TIMEOUT_S)
        client.http.session = web
        yield client


@contextmanager
def nomad_api(host: Host, token: str = "operator") -> Iterator[nomad.Nomad]:
    """python-nomad against the agent on `host`. token: bootstrap, or one of tasks/nomad_acl.py."""
    with (
        forward(host, host.data.nomad_http_port, host.data.nomad_http_address) as port,
        http_session() as web,
    ):
        access = _nomad_access(host, token, port)
        yield nomad.Nomad(timeout=TIMEOUT_S, session=web, **access)


def _nomad_access(host: Host, token: str, port: int) -> dict[str, Any]:
    """Where a token is not made yet, we come without one: Nomad's refusal is then an answer to wait on."""
    if not host.data.secure:
        return {"address": f"http://127.0.0.1:{port}", "verify": True}
    where = secrets.folder(host.data)
    secret = where / f"token-nomad-{token}"
    return {
        "address": f"https://127.0.0.1:{port}",
        "verify": str(where / "ca.pem"),
        "cert": (str(where / "operator.pem"), str(where / "operator.key")),
        "token": secret.read_text().strip() if secret.exists() else None,
    }


def wait_until(
    what: str,
    check: Callable[[], str | None],
    deadline_s: float,
    say: Callable[[str], Any] = lambda line: None,
) -> str | None:
    """Ask `check` until it answers None (all is well); returns its last answer once time is up.

    `check` says in a few words what is still missing. An API that does not answer counts as missing.
    `say` gets a line of progress every 5 s.
    """
    start = shown = time.monotonic()
    while True:
        try:
            missing = check()
        except Unavailable as error:
            missing = f"no answer ({error or type(error).__name__})"
        now = time.monotonic()
        if missing is None or now - start > deadline_s:
            return missing
        if now - shown > 5:
            say(f"waiting {now - start:.0f} s for {what}: {missing}")
            shown = now
        time.sleep(0.25)
