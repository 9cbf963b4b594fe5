"""The way to the APIs through a real SSH server on loopback."""

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread, active_count
from types import SimpleNamespace
from typing import ClassVar, cast

import paramiko
import pytest
import requests
from pyinfra.api.host import Host

import tasks.consul
import tasks.nomad
from tasks import certificates, cluster, secrets
from tests.unit.ssh_server import ssh_server

ROOT = Path(__file__).parents[2]


class Api(BaseHTTPRequestHandler):
    """Answers like Consul and Nomad, echoes what is posted, and counts the open connections."""

    protocol_version = "HTTP/1.1"  # keep-alive: a connection lasts until its client lets go
    open: ClassVar[set[int]] = set()
    tokens: ClassVar[list[str]] = []

    def setup(self) -> None:
        super().setup()
        self.open.add(id(self))

    def finish(self) -> None:
        super().finish()
        self.open.discard(id(self))

    def do_GET(self) -> None:
        self.tokens.extend(value for name, value in self.headers.items() if name.endswith("-Token"))
        answers = {"/v1/status/leader": "192.168.56.12:8300", "/v1/regions": ["global"]}
        if self.path in answers:
            self._answer(json.dumps(answers[self.path]).encode())
        else:
            self._answer(b"No cluster leader", status=500)

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[int]:
    """The port of an API."""
    Api.open.clear()
    Api.tokens.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return cast(int, listener.getsockname()[1])


KEY = paramiko.ECDSAKey.generate()


@pytest.fixture
def secrets_folder(tmp_path: Path) -> Path:
    """With the secrets and certificates of a cluster."""
    secrets.make(tmp_path / "secrets")
    secrets.write(tmp_path / "secrets", "token-nomad-operator", "made by Nomad")
    certificates.make(tmp_path / "secrets")
    return tmp_path / "secrets"


@pytest.fixture
def tls_api(api: int, secrets_folder: Path) -> Iterator[int]:
    """The port of an API with TLS that wants a certificate of our CA."""
    profile = certificates.Profile(("server.dc1.consul",), ("127.0.0.1",))
    certificates.issued(secrets_folder, "server", profile)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(secrets_folder / "server.pem", secrets_folder / "server.key")
    context.load_verify_locations(secrets_folder / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def secure_host(host: Host, tls_api: int, secrets_folder: Path) -> Host:
    data = vars(host.data)
    data |= {"secure": True, "secrets_folder": str(secrets_folder)}
    data |= {"consul_https_port": tls_api, "nomad_http_port": tls_api}
    return host


@pytest.fixture
def host(api: int) -> Iterator[Host]:
    """What cluster.py uses of a pyinfra host: its data, and its connector's SSH client."""
    data = {
        f"{tool}_http_{what}": value
        for tool in ("consul", "nomad")
        for what, value in (("address", "127.0.0.1"), ("port", api))
    } | {"secure": False}
    with ssh_server(KEY) as port, paramiko.SSHClient() as client:
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        client.connect("127.0.0.1", port, "vagrant", pkey=KEY, allow_agent=False, look_for_keys=False)
        connector = SimpleNamespace(client=client)
        yield cast(Host, SimpleNamespace(connected=True, connector=connector, data=SimpleNamespace(**data)))


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_bytes_pass_unchanged_both_ways(host: Host, api: int) -> None:
    sent = os.urandom(3_000_000)
    with cluster.forward(host, api) as port:
        assert requests.post(f"http://127.0.0.1:{port}", sent, timeout=30).content == sent


def test_the_port_is_closed_at_the_end(host: Host, api: int) -> None:
    threads = active_count()
    with cluster.forward(host, api) as port:
        socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert eventually(lambda: active_count() <= threads)


def test_the_port_is_closed_after_an_exception_too(host: Host, api: int) -> None:
    with pytest.raises(ZeroDivisionError), cluster.forward(host, api) as port:
        _ = 1 / 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_nothing_listening_is_an_error_at_once(host: Host, closed_port: int) -> None:
    with cluster.forward(host, closed_port) as port, pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}", timeout=5)


def test_a_lost_ssh_connection_is_an_error_at_once(host: Host, api: int) -> None:
    host.connector.client.get_transport().close()  # type: ignore[attr-defined]
    with cluster.forward(host, api) as port, pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}", timeout=5)


def test_both_clients_answer_and_leave_no_connection_open(host: Host) -> None:
    """Consul refuses the 201st connection from one address, Nomad the 101st."""
    for _ in range(3):
        with cluster.consul_api(host) as consul, cluster.nomad_api(host) as nomad:
            assert consul.status.leader() == "192.168.56.12:8300"
            assert nomad.regions.get_regions() == ["global"]
            assert len(Api.open) == 2
        assert eventually(lambda: not Api.open)


def test_both_clients_show_their_certificate_and_token(secure_host: Host, secrets_folder: Path) -> None:
    with cluster.consul_api(secure_host) as consul, cluster.nomad_api(secure_host) as nomad:
        assert consul.status.leader() == "192.168.56.12:8300"
        assert nomad.regions.get_regions() == ["global"]
    wanted = [secrets.token(secrets_folder, name) for name in ("consul-bootstrap", "nomad-operator")]
    assert Api.tokens == wanted


def test_a_script_acts_with_less(
    secure_host: Host, secrets_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_role", "operator")
    cluster.act_as("status", secure_host.data)
    with cluster.consul_api(secure_host) as consul:
        consul.status.leader()
    assert Api.tokens == [secrets.token(secrets_folder, "consul-status")]


def test_a_server_of_another_ca_is_refused(secure_host: Host, secrets_folder: Path) -> None:
    key = certificates.new_key()
    secrets.write(secrets_folder, "ca.key", key)
    secrets.write(secrets_folder, "ca.pem", certificates.new_ca(key))
    with cluster.consul_api(secure_host) as consul, pytest.raises(cluster.Unavailable):
        consul.status.leader()
    with cluster.nomad_api(secure_host) as nomad, pytest.raises(cluster.Unavailable):
        nomad.regions.get_regions()
    assert Api.tokens == []


@pytest.mark.parametrize("autopilot", [tasks.consul.autopilot, tasks.nomad.autopilot])
def test_no_leader_is_an_answer_to_wait_on(host: Host, autopilot: Callable[[Host], object]) -> None:
    """Status 500 and plain text, where JSON was asked for."""
    with pytest.raises(cluster.Unavailable):
        autopilot(host)


STRAY = {
    "CONSUL_HTTP_ADDR": "203.0.113.1:8500",
    "CONSUL_HTTP_TOKEN": "stray",
    "CONSUL_HTTP_SSL": "true",
    "NOMAD_ADDR": "http://203.0.113.1:4646",
    "NOMAD_TOKEN": "stray",
    "NOMAD_REGION": "stray",
    "http_proxy": "http://203.0.113.1:3128",
    "no_proxy": "",
}


def test_pyinfra_itself_with_a_stray_environment(tmp_path: Path, api: int, closed_port: int) -> None:
    """The real ssh connector and gevent's patched threads; variables for another cluster are ignored."""
    KEY.write_private_key_file(str(tmp_path / "key"))
    with ssh_server(KEY) as port:
        data = {
            "ssh_hostname": "127.0.0.1",
            "ssh_port": port,
            "ssh_user": "vagrant",
            "ssh_key": str(tmp_path / "key"),
            "ssh_known_hosts_file": str(tmp_path / "known_hosts"),
            "closed_port": closed_port,
            "consul_http_port": api,
            "nomad_http_port": api,
            "secure": False,
        }
        (tmp_path / "inventory.py").write_text(f"hosts = [('worker-01', {data})]\n")
        ask = str(ROOT / "tests/unit/fake/ask.py")
        ran = subprocess.run(
            [sys.executable, "-m", "pyinfra", "-y", str(tmp_path / "inventory.py"), ask],
            cwd=ROOT,
            env={**os.environ, **STRAY},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ran.returncode == 0, ran.stderr
    answers = {"leader": "192.168.56.12:8300", "regions": ["global"], "refused": True}
    assert json.loads(ran.stdout.splitlines()[0]) == answers
    assert Api.tokens == []


# wait_until, with a clock of its own.


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cluster, "time", clock)
    return clock


def answers(*each: str | Exception | None) -> Callable[[], str | None]:
    """Gives one after the other, the last one for ever."""
    left = list(each)

    def check() -> str | None:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return check


def test_all_well_at_once_takes_no_time(clock: Clock) -> None:
    assert cluster.wait_until("it", answers(None), 60) is None
    assert clock.now == 1000


def test_it_asks_until_all_is_well(clock: Clock) -> None:
    assert cluster.wait_until("it", answers("no", "no", None), 60) is None
    assert 1000 < clock.now < 1002


def test_after_the_deadline_it_gives_the_last_answer(clock: Clock) -> None:
    assert cluster.wait_until("it", answers("no leader", "no quorum"), 60) == "no quorum"
    assert 1060 <= clock.now <= 1061


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset"), requests.ReadTimeout("late"), paramiko.SSHException("gone")]
)
def test_an_api_that_does_not_answer_is_waited_for(clock: Clock, error: Exception) -> None:
    assert cluster.wait_until("it", answers(error, None), 60) is None
    assert cluster.wait_until("it", answers(error), 1) == f"no answer ({error})"


def test_a_bug_in_a_check_is_not_waited_for(clock: Clock) -> None:
    with pytest.raises(KeyError):
        cluster.wait_until("it", answers(KeyError("Servers")), 60)


def test_progress_is_shown_every_five_seconds(clock: Clock) -> None:
    lines: list[str] = []
    cluster.wait_until("a leader", answers("none yet"), 16, lines.append)
    assert lines == [f"waiting {second} s for a leader: none yet" for second in (5, 10, 16)]
