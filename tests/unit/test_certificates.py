"""The CA and what it signs, judged by OpenSSL as Python's ssl has it: real handshakes."""

import shutil
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import cast

import pytest
from cryptography import x509
from pyinfra.api.host import Host

from tasks import certificates, secrets
from tasks.certificates import CLIENT, SERVER, Profile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certificates.make(tmp_path)
    return tmp_path


def member(folder: Path, *groups: str) -> Host:
    data = SimpleNamespace(
        secrets_folder=str(folder),
        address="192.168.56.11",
        consul_datacenter="dc1",
        nomad_region="global",
        haproxy_vip="192.168.56.20",
    )
    return cast(Host, SimpleNamespace(name="worker-01", data=data, groups=list(groups)))


def handshake(folder: Path, server: str, client: str, name: str) -> str:
    """What comes of `client` (files in the folder) greeting `server` as `name`: "" if all is well."""
    serve, ask = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    serve.verify_mode = ssl.CERT_REQUIRED
    for context, pair in ((serve, server), (ask, client)):
        context.load_verify_locations(folder / "ca.pem")
        context.load_cert_chain(folder / f"{pair}.pem", folder / f"{pair}.key")
    left, right = socket.socketpair()
    faults: list[str] = []

    def greet(run: Callable[[], ssl.SSLSocket]) -> None:
        try:
            with run() as connection:
                connection.send(b"x")
                connection.recv(1)
        except ssl.SSLError as error:
            faults.append(str(error))

    other = Thread(target=greet, args=[lambda: serve.wrap_socket(left, server_side=True)])
    other.start()
    greet(lambda: ask.wrap_socket(right, server_hostname=name))
    other.join()
    return "; ".join(faults)


def test_a_server_and_an_operator_trust_each_other(folder: Path) -> None:
    certificates.certificate(member(folder, "servers"), "consul")
    certificates.operator(folder)
    server = "hosts/worker-01/consul"
    names = ("server.dc1.consul", "localhost", "127.0.0.1", "worker-01", "192.168.56.11")
    assert {name: handshake(folder, server, "operator", name) for name in names} == dict.fromkeys(names, "")


@pytest.mark.parametrize(
    ("role", "name"), [("consul", "server.dc1.consul"), ("nomad", "server.global.nomad")]
)
def test_a_clients_certificate_does_not_pass_for_a_servers(folder: Path, role: str, name: str) -> None:
    certificates.certificate(member(folder), role)
    client = f"hosts/worker-01/{role}"
    assert "mismatch" in handshake(folder, client, client, name)


@pytest.mark.parametrize("role", ["registry", "haproxy"])
def test_what_only_serves_is_refused_as_a_client(folder: Path, role: str) -> None:
    certificates.certificate(member(folder, "servers"), "consul")
    certificates.certificate(member(folder, "servers"), role)
    fault = handshake(folder, "hosts/worker-01/consul", f"hosts/worker-01/{role}", "localhost")
    assert "unsuitable certificate purpose" in fault


def test_an_operator_is_no_server(folder: Path) -> None:
    certificates.operator(folder)
    assert handshake(folder, "operator", "operator", "operator")


def test_another_ca_is_refused(folder: Path) -> None:
    other = folder / "other"
    certificates.make(other)
    certificates.operator(other)
    certificates.certificate(member(folder, "servers"), "consul")
    for end in ("pem", "key"):
        shutil.copy(other / f"operator.{end}", folder / f"stranger.{end}")
    assert handshake(folder, "hosts/worker-01/consul", "stranger", "localhost")


def test_the_proxys_certificate_is_good_for_the_shared_address(folder: Path) -> None:
    certificates.operator(folder)
    certificates.certificate(member(folder), "haproxy")
    assert handshake(folder, "hosts/worker-01/haproxy", "operator", "192.168.56.20") == ""


def test_the_lives(folder: Path) -> None:
    assert certificates.days_left(certificates.ca(folder)) == 3649
    assert certificates.days_left(certificates.operator(folder).pem) == 364


def test_only_their_owner_can_read_them(folder: Path) -> None:
    certificates.certificate(member(folder), "consul")
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 4
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700


PROFILE = Profile(("one", "localhost"), ("127.0.0.1",), (SERVER, CLIENT))


def test_a_certificate_stays(folder: Path) -> None:
    first = certificates.issued(folder, "one", PROFILE)
    assert certificates.issued(folder, "one", PROFILE) == first


@pytest.mark.parametrize(("days", "renewed"), [(200, False), (240, False), (246, True), (400, True)])
def test_it_is_renewed_under_a_third_of_its_life(
    folder: Path, monkeypatch: pytest.MonkeyPatch, days: int, renewed: bool
) -> None:
    first = certificates.issued(folder, "one", PROFILE)
    later = datetime.now(UTC) + timedelta(days=days)
    monkeypatch.setattr(certificates, "_now", lambda: later)
    second = certificates.issued(folder, "one", PROFILE)
    assert (second != first) is renewed
    assert certificates.days_left(second.pem) == (364 if renewed else 364 - days)


def _other_address(folder: Path) -> Profile:
    return Profile(PROFILE.names, ("127.0.0.1", "192.168.56.99"), PROFILE.usages)


def _lost_key(folder: Path) -> Profile:
    (folder / "one.key").unlink()
    return PROFILE


def _half_written(folder: Path) -> Profile:
    secrets.write(folder, "one.key", certificates.new_key())
    return PROFILE


def _new_ca(folder: Path) -> Profile:
    secrets.write(folder, "ca.key", certificates.new_key())
    secrets.write(folder, "ca.pem", certificates.new_ca(secrets.read(folder, "ca.key")))
    return PROFILE


@pytest.mark.parametrize("change", [_other_address, _lost_key, _half_written, _new_ca])
def test_it_is_made_anew_when_it_does_not_fit(folder: Path, change: Callable[[Path], Profile]) -> None:
    first = certificates.issued(folder, "one", PROFILE)
    second = certificates.issued(folder, "one", change(folder))
    assert second != first
    for end in ("pem", "key"):
        shutil.copy(folder / f"one.{end}", folder / f"two.{end}")
    assert handshake(folder, "one", "two", "localhost") == ""


@pytest.mark.parametrize("name", ["ca.pem", "ca.key"])
def test_a_lost_ca_is_an_error_and_no_new_one(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(secrets.Missing, match=name):
        certificates.make(folder)
    with pytest.raises(secrets.Missing, match=name):
        certificates.operator(folder)


def test_a_ca_of_ones_own_signs(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for name in ("ca.key", "ca.pem"):
        secrets.write(mine, name, secrets.read(folder, name))
    certificates.make(mine)
    pair = certificates.operator(mine)
    ca = x509.load_pem_x509_certificate(certificates.ca(folder).encode())
    x509.load_pem_x509_certificate(pair.pem.encode()).verify_directly_issued_by(ca)


def test_certificates_of_ones_own_are_used_as_they_are(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    secrets.write(mine, "ca.pem", certificates.ca(folder))
    certificates.make(mine)
    pair = certificates.issued(folder, "one", PROFILE)
    secrets.write(mine, "operator.pem", pair.pem)
    with pytest.raises(secrets.Missing, match=r"operator\.key"):
        certificates.operator(mine)
    secrets.write(mine, "operator.key", pair.key)
    assert certificates.operator(mine) == pair
    (mine / "ca.pem").unlink()
    with pytest.raises(secrets.Missing, match=r"ca\.pem"):
        certificates.make(mine)


def test_of_two_trusted_ones_that_of_the_key_signs(folder: Path) -> None:
    old = certificates.ca(folder)
    certificates.issued(folder, "one", PROFILE)
    key = certificates.new_key()
    new = certificates.new_ca(key)
    secrets.write(folder, "ca.pem", old + new)
    first = certificates.issued(folder, "one", PROFILE)
    secrets.write(folder, "ca.key", key)
    certificates.issued(folder, "two", PROFILE)
    assert handshake(folder, "one", "two", "localhost") == handshake(folder, "two", "one", "localhost") == ""
    assert certificates.issued(folder, "one", PROFILE) != first
