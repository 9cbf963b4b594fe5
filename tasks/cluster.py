"""The cluster's APIs from the controller: python-consul2 and python-nomad through pyinfra's own SSH.

Nothing but SSH has to reach the hosts: the APIs listen on their loopback, and a forward goes through
the connection that pyinfra has opened, so it obeys the same keys, jump hosts and known hosts. Inside of
it both ends show a certificate of our CA, and every request carries the token of this run's role.
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
from pyinfra.api.host import Host, HostData

from tasks import certificates, secrets

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


# Whose tokens this run uses: deploy.py may do all; a script that needs less says so.
_role = "operator"


def act_as(role: str, data: HostData) -> None:
    """Use the tokens of `role` (release or status) from here on. Raises secrets.Missing, in one line."""
    global _role
    _role = role
    if data.secure:
        where = secrets.folder(data)
        certificates.operator(where)
        secrets.own_token(where, _consul_token())


def _consul_token() -> str:
    """The name of this run's token in Consul, where the operator's is the bootstrap token."""
    return "consul-bootstrap" if _role == "operator" else f"consul-{_role}"


def _tls(data: HostData) -> dict[str, Any]:
    """What both clients take: the CA that is trusted, and our certificate."""
    if not data.secure:
        return {"verify": True}
    where = secrets.folder(data)
    certificates.operator(where)  # renewed in time
    pair = (str(where / "operator.pem"), str(where / "operator.key"))
    return {"verify": str(where / "ca.pem"), "cert": pair}


@contextmanager
def consul_api(host: Host, token: str = "") -> Iterator[consul.Consul]:
    """python-consul2 against the agent on `host`, with the token of this run's role or another one."""
    data = host.data
    port = data.consul_https_port if data.secure else data.consul_http_port
    with forward(host, port, data.consul_http_address) as local, http_session() as web:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            scheme = "https" if data.secure else "http"
            client = consul.Consul(
                host="127.0.0.1", port=local, scheme=scheme, timeout=TIMEOUT_S, **_tls(data)
            )
        client.http.session = web
        if data.secure:
            # Not the client's own `token`: calls through client.http would go without.
            web.headers["X-Consul-Token"] = token or secrets.own_token(secrets.folder(data), _consul_token())
        yield client


@contextmanager
def nomad_api(host: Host, token: str = "") -> Iterator[nomad.Nomad]:
    """python-nomad against the agent on `host`. token: bootstrap; by default that of this run's role."""
    data = host.data
    with forward(host, data.nomad_http_port, data.nomad_http_address) as local, http_session() as web:
        address = f"{'https' if data.secure else 'http'}://127.0.0.1:{local}"
        secret = _nomad_token(data, token or _role) if data.secure else None
        yield nomad.Nomad(address=address, timeout=TIMEOUT_S, session=web, token=secret, **_tls(data))


def _nomad_token(data: HostData, name: str) -> str | None:
    """Where a token is not made yet, we come without one: Nomad's refusal is then an answer to wait on."""
    file = secrets.folder(data) / f"token-nomad-{name}"
    return file.read_text().strip() if file.exists() else None


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
