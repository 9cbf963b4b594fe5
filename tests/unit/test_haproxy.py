"""HAProxy's configuration: what the tools say about it, and how a real HAProxy behaves with it."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import socketserver
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyinfra.api.util import get_template

import group_data.all
from tasks.mirror import cache_dir

DEADLINE_S = 20
needs_haproxy = pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed")


def render(name: str, **values: object) -> str:
    """A template of templates/haproxy as pyinfra renders it; `values` override group_data/all.py."""
    discover = values.pop("discover", False)
    data = SimpleNamespace(**{**vars(group_data.all), **values})
    template = get_template(f"templates/haproxy/{name}", {"trim_blocks": True})
    return template.render(host=SimpleNamespace(data=data), discover=discover, token="")


def check(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["haproxy", "-c", "-f", config], capture_output=True, text=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@needs_haproxy
def test_the_configuration_without_servers_is_valid(tmp_path: Path) -> None:
    (tmp_path / "haproxy.cfg").write_text(render("haproxy.cfg.j2"))
    result = check(tmp_path / "haproxy.cfg")
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr


# -- consul-template, with answers in the shape of Consul's /v1/health/service/<name>


def instance(address: str, port: int, version: str = "") -> dict[str, Any]:
    service = {"ID": f"{address}-{port}-{version}", "Service": "app", "Address": address, "Port": port}
    node = {"Node": address, "Address": address, "Datacenter": "dc1"}
    return {
        "Node": node,
        "Service": {**service, "Meta": {"version": version} if version else {}},
        "Checks": [],
    }


class ConsulAnswer(BaseHTTPRequestHandler):
    instances: list[dict[str, Any]]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = json.dumps(self.instances).encode()
        self.send_response(200)
        self.send_header("X-Consul-Index", "7")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="session")
def consul_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed binary, or the one in the local folder of zips."""
    if installed := shutil.which("consul-template"):
        return Path(installed)
    zips = sorted((cache_dir() / "consul-template").glob("*/*_linux_*.zip"))
    if not zips:
        pytest.skip("no consul-template here; make up fetches or builds it")
    folder = tmp_path_factory.mktemp("bin")
    with zipfile.ZipFile(zips[-1]) as archive:
        archive.extract("consul-template", folder)
    (folder / "consul-template").chmod(0o755)
    return folder / "consul-template"


def discover(folder: Path, consul_template: Path, instances: list[dict[str, Any]]) -> str:
    """What consul-template renders when Consul answers with `instances`."""
    (folder / "haproxy.cfg.ctmpl").write_text(render("haproxy.cfg.j2", discover=True))
    handler = type("Answer", (ConsulAnswer,), {"instances": instances, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as consul, serving(consul):
        config = render("consul-template.hcl.j2", consul_http_port=consul.server_address[1])
        config = config.replace("/etc/consul-template", str(folder))
        config = config.replace("/var/lib/consul-template", str(folder))
        (folder / "consul-template.hcl").write_text(config)
        subprocess.run(
            [consul_template, "-once", f"-config={folder}/consul-template.hcl"],
            check=True,
            timeout=DEADLINE_S,
            capture_output=True,
        )
    assert all("passing" in path for path in handler.asked)  # type: ignore[attr-defined]
    return (folder / "haproxy.cfg").read_text()


def server_lines(config: str) -> list[str]:
    return re.findall(r"^ *(server .*)$", config, re.MULTILINE)


def test_each_instance_is_a_server_named_after_its_version(tmp_path: Path, consul_template: Path) -> None:
    config = discover(
        tmp_path,
        consul_template,
        [
            instance("10.0.0.12", 20001, "0.0.2"),
            instance("10.0.0.11", 20003, "0.0.3-rc.1"),
            instance("10.0.0.13", 20002),
        ],
    )
    assert server_lines(config) == [
        "server app-0.0.3-rc.1-10.0.0.11-20003 10.0.0.11:20003",
        "server app-0.0.2-10.0.0.12-20001 10.0.0.12:20001",
        "server app-unknown-10.0.0.13-20002 10.0.0.13:20002",
    ]
    rest = re.sub(r"^ *server .*\n", "", config, flags=re.MULTILINE)
    assert rest == render("haproxy.cfg.j2"), "deploy.py compares the two"
    if shutil.which("haproxy"):
        result = check(tmp_path / "haproxy.cfg")
        assert result.returncode == 0, result.stderr


def test_no_instance_renders_no_server(tmp_path: Path, consul_template: Path) -> None:
    assert discover(tmp_path, consul_template, []) == render("haproxy.cfg.j2")


def test_an_address_that_is_registered_twice_is_one_server(tmp_path: Path, consul_template: Path) -> None:
    twice = [instance("10.0.0.11", 20001, "0.0.2"), instance("10.0.0.11", 20001, "0.0.3")]
    assert len(server_lines(discover(tmp_path, consul_template, twice))) == 1


def test_a_version_cannot_write_configuration(tmp_path: Path, consul_template: Path) -> None:
    evil = instance("10.0.0.11", 20001, "1\n    server evil 10.0.0.66:80")
    assert "evil" not in discover(tmp_path, consul_template, [evil])


# -- HAProxy itself, in front of servers that fail in different ways


class Echo(BaseHTTPRequestHandler):
    """Healthy: answers a POST with its body."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(b"OK")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Swallow(Echo):
    """Passes the health check, but takes every other request and closes without an answer."""

    swallowed: list[str]

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.path == "/status":
            return True
        self.swallowed.append(self.command)
        self.close_connection = True
        return False


@contextmanager
def haproxy(folder: Path, ports: list[int]) -> Iterator[int]:
    """HAProxy with our configuration in front of `ports`; yields its port once it listens."""
    front = free_port()
    config = render(
        "haproxy.cfg.j2", haproxy_bind="127.0.0.1", haproxy_http_port=front, haproxy_stats_port=free_port()
    )
    servers = "".join(f"\n    server app-{port} 127.0.0.1:{port}" for port in ports)
    config = re.sub(r"(default-server .*)", rf"\1{servers}", config)
    # What only root on a proxy has.
    config = re.sub(r"^ *(log /|chroot|user|group|stats socket).*\n", "", config, flags=re.MULTILINE)
    (folder / "haproxy.cfg").write_text(config)
    with subprocess.Popen(["haproxy", "-db", "-f", folder / "haproxy.cfg"]) as process:
        try:
            wait_until(lambda: listens(front))
            yield front
        finally:
            process.kill()


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "HAProxy does not listen"
        time.sleep(0.02)


def send(port: int, method: str, body: str | None = None) -> tuple[int, str]:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    client.request(method, "/echo", body)
    answer = client.getresponse()
    result = answer.status, answer.read().decode()
    client.close()
    return result


@needs_haproxy
def test_no_server_is_a_503(tmp_path: Path) -> None:
    with haproxy(tmp_path, []) as port:
        assert send(port, "GET")[0] == 503


@needs_haproxy
def test_a_server_that_is_gone_costs_no_request(tmp_path: Path) -> None:
    """Also no POST: nothing of it has been sent when the connection fails."""
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Echo) as echo,
        serving(echo),
        haproxy(tmp_path, [free_port(), echo.server_address[1]]) as port,
    ):
        answers = [send(port, "POST", f"body {n}") for n in range(20)]
    assert answers == [(200, f"body {n}") for n in range(20)]


@needs_haproxy
def test_a_swallowed_request_is_repeated_only_if_it_may_be(tmp_path: Path) -> None:
    handler = type("Swallower", (Swallow,), {"swallowed": []})
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Echo) as echo,
        serving(echo),
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as swallow,
        serving(swallow),
        haproxy(tmp_path, [swallow.server_address[1], echo.server_address[1]]) as port,
    ):
        gets = [send(port, "GET")[0] for _ in range(10)]
        posts = [send(port, "POST", "body")[0] for _ in range(10)]
    swallowed: list[str] = handler.swallowed  # type: ignore[attr-defined]
    assert gets == [200] * 10 and "GET" in swallowed
    assert posts.count(502) == swallowed.count("POST") > 0
