"""DNS: what the templates say, and what happens to a resolv.conf."""

import shutil
import subprocess
from pathlib import Path

import pytest
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tasks import dns

TEMPLATES = Path(__file__).parents[2] / "templates" / "dns"


def render(name: str, **values: object) -> str:
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, autoescape=False)
    return environment.get_template(name).render(**values)


def put_first(resolv_conf: Path) -> None:
    subprocess.run(["sh", TEMPLATES / "consul-dns-first", resolv_conf], check=True)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("nameserver 10.0.0.1\n", "nameserver 127.0.0.1\nnameserver 10.0.0.1\n"),
        (
            "search example.com\nnameserver 10.0.0.1\noptions ndots:0\n",
            "nameserver 127.0.0.1\nsearch example.com\nnameserver 10.0.0.1\noptions ndots:0\n",
        ),
        (
            "nameserver 10.0.0.1\nnameserver 127.0.0.1\n",
            "nameserver 127.0.0.1\nnameserver 10.0.0.1\n",
        ),
        ("nameserver 127.0.0.11\n", "nameserver 127.0.0.1\nnameserver 127.0.0.11\n"),
        ("", "nameserver 127.0.0.1\n"),
    ],
)
def test_the_resolver_comes_first_and_the_others_stay(tmp_path: Path, before: str, after: str) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(before)
    put_first(resolv_conf)
    assert resolv_conf.read_text() == after


def test_the_file_is_written_in_place(tmp_path: Path) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("nameserver 10.0.0.1\n")
    inode = resolv_conf.stat().st_ino
    put_first(resolv_conf)
    assert resolv_conf.stat().st_ino == inode


def test_a_file_that_is_right_is_not_written(tmp_path: Path) -> None:
    """Else the path unit, which watches for writes, would start itself for ever."""
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("# made by hand\nnameserver 127.0.0.1\nnameserver 10.0.0.1\n")
    written = resolv_conf.stat().st_mtime_ns
    put_first(resolv_conf)
    assert resolv_conf.stat().st_mtime_ns == written


def test_dnsmasq_accepts_its_configuration(tmp_path: Path) -> None:
    if not shutil.which("dnsmasq"):
        pytest.skip("dnsmasq is not installed here")
    config = tmp_path / "dnsmasq.conf"
    config.write_text(render("dnsmasq.conf.j2", consul_port=8600, addresses=["127.0.0.1", "172.17.0.1"]))
    subprocess.run(["dnsmasq", "--test", f"--conf-file={config}"], check=True)


def test_dnsmasq_listens_on_the_named_addresses_only() -> None:
    config = render("dnsmasq.conf.j2", consul_port=8600, addresses=["127.0.0.1", "172.17.0.1"])
    listening = [line for line in config.splitlines() if line.startswith(("listen", "interface"))]
    assert listening == ["listen-address=127.0.0.1", "listen-address=172.17.0.1"]


@pytest.mark.parametrize(("docker_address", "lines"), [("172.17.0.1", 1), ("", 0)])
def test_resolved_serves_containers_where_there_are_any(docker_address: str, lines: int) -> None:
    config = render("resolved.conf.j2", consul_port=8600, docker_address=docker_address)
    assert config.count("DNSStubListenerExtra=") == lines


@pytest.mark.parametrize(("answer", "fact"), [("yes", True), ("no", False)])
def test_facts_read_the_shells_answer(answer: str, fact: bool) -> None:
    assert dns.UsesResolved().process([answer]) is fact
    assert dns.ResolverIsFirst().process([answer]) is fact
