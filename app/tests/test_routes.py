"""The service's answers, without a server."""

import pytest
from flask.testing import FlaskClient

from app import app as service


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    monkeypatch.setattr(service, "VERSION", "1.2.3")
    monkeypatch.setattr(service, "HOSTNAME", "here")
    return service.app.test_client()


@pytest.mark.parametrize(
    ("path", "body"),
    [("/", "Hello from here!\n"), ("/version", "Version: 1.2.3\n"), ("/status", "OK\n")],
)
def test_get(client: FlaskClient, path: str, body: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.text) == (200, body)


@pytest.mark.parametrize("body", [b"", b"text", b"line\n\n", bytes(range(256))])
def test_echo_answers_the_version_and_every_byte(client: FlaskClient, body: bytes) -> None:
    assert client.post("/echo", data=body).data == b"Version: 1.2.3\n" + body


def test_echo_of_a_form_is_its_bytes_too(client: FlaskClient) -> None:
    answer = client.post("/echo", data=b"a=b&c", content_type="application/x-www-form-urlencoded")
    assert answer.data == b"Version: 1.2.3\na=b&c"


def test_echo_answers_plain_text_only(client: FlaskClient) -> None:
    answer = client.post("/echo", data=b"<script>")
    assert answer.mimetype == "text/plain"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_long_body_is_refused(client: FlaskClient) -> None:
    assert client.post("/echo", data=b"x" * (1024 * 1024 + 1)).status_code == 413


def test_echo_takes_post_only(client: FlaskClient) -> None:
    assert client.get("/echo").status_code == 405
