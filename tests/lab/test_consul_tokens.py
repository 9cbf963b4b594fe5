"""What each of Consul's tokens may do and may not; who has another gossip key stays out."""

from __future__ import annotations

import base64
import json

import pytest

from group_data import all as knobs
from tasks import secrets
from tests.lab import hosts

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not hosts.knob("secure"), reason="this lab is open: secure = False"),
]
SERVER = hosts.names("servers")[0]
RECORD = "/v1/kv/hashistack/release/test-of-tokens"
APP = {"Name": knobs.app_name, "ID": "test-of-tokens", "Port": 1}
OTHER = {**APP, "Name": "test-of-tokens"}
OK, ABSENT, REFUSED = 200, 404, 403  # absent: it may look, and there is nothing


@pytest.mark.parametrize(
    ("token", "method", "path", "body", "status"),
    [
        ("", "GET", "/v1/catalog/services", None, OK),
        ("", "GET", RECORD, None, REFUSED),
        ("", "PUT", "/v1/agent/service/register", OTHER, REFUSED),
        ("", "GET", "/v1/operator/raft/configuration", None, REFUSED),
        ("", "GET", "/v1/acl/tokens", None, REFUSED),
        ("dns", "PUT", "/v1/session/create", {}, REFUSED),
        ("template", "GET", RECORD, None, REFUSED),
        ("template", "PUT", "/v1/agent/service/register", APP, REFUSED),
        ("nomad", "GET", "/v1/agent/self", None, OK),
        ("nomad", "PUT", "/v1/agent/service/register", OTHER, REFUSED),
        ("nomad", "PUT", RECORD, "x", REFUSED),
        ("nomad", "GET", "/v1/acl/tokens", None, REFUSED),
        ("registration", "PUT", "/v1/agent/service/register", OTHER, REFUSED),
        ("registration", "GET", RECORD, None, REFUSED),
        ("release", "GET", RECORD, None, ABSENT),
        ("release", "PUT", "/v1/kv/elsewhere", "x", REFUSED),
        ("release", "PUT", "/v1/agent/service/register", APP, REFUSED),
        ("release", "GET", "/v1/operator/raft/configuration", None, REFUSED),
        ("release", "GET", "/v1/acl/tokens", None, REFUSED),
        ("status", "GET", RECORD, None, ABSENT),
        ("status", "GET", "/v1/operator/raft/configuration", None, OK),
        ("status", "PUT", RECORD, "x", REFUSED),
        ("status", "PUT", "/v1/session/create", {}, REFUSED),
        ("status", "PUT", "/v1/agent/leave", None, REFUSED),
        ("status", "GET", "/v1/acl/tokens", None, REFUSED),
        ("bootstrap", "GET", "/v1/acl/tokens", None, OK),
    ],
)
def test_token(token: str, method: str, path: str, body: object, status: int) -> None:
    text = "" if body is None else json.dumps(body)
    show = f"X-Consul-Token: {secrets.token(hosts.settings.SECRETS, f'consul-{token}')}\r\n" if token else ""
    request = f"{method} {path} HTTP/1.0\r\n{show}Content-Length: {len(text)}\r\n\r\n{text}"
    # The token goes by standard input: no process list shows it.
    ask = f"exec 3<>/dev/tcp/127.0.0.1/{knobs.consul_http_port}; cat >&3 <<'EOF'\n{request}\nEOF\ncat <&3"
    assert int(hosts.on(SERVER, ask).split()[1]) == status


def test_who_has_another_gossip_key_does_not_get_in() -> None:
    address = hosts.HOSTS[SERVER]["address"]
    wrong = base64.b64encode(b"w" * 32).decode()
    join = (
        "folder=$(mktemp -d); timeout 20 consul agent -node stranger -data-dir $folder -datacenter"
        f" {knobs.consul_datacenter} -bind {address} -client 127.0.0.1 -http-port 18500 -dns-port -1"
        f" -serf-lan-port 18301 -encrypt {wrong} -join {address}:8301"
        " -hcl 'disable_update_check = true' 2>&1; rm -r $folder"
    )
    said = hosts.on(SERVER, join)
    assert "No installed keys could decrypt the message" in said, said
    names = [member["Name"] for member in hosts.api(SERVER, knobs.consul_http_port, "/v1/agent/members")]
    assert "stranger" not in names
