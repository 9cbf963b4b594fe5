"""Who may write to a worker's registry: whoever trusts our CA and knows its password.

A registry listens twice over the same folder: read-only on loopback, for the Docker of the host, which
takes 127.0.0.0/8 without TLS; and on the private address with TLS and a password, for builds and copies.
Without `secure` it is one listener for both.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from typing import Any

import bcrypt
from pyinfra import inventory
from pyinfra.api.host import Host, HostData

from tasks import certificates, config, secrets

USER = "hashistack"
SERVER = "/etc/hashistack/registry-tls"  # what a registry reads
CLIENT = "/etc/hashistack/registry"  # for Docker's --config and skopeo's --authfile and --cert-dir
CERTIFICATE = f"{SERVER}/registry.pem"
READS_AT_START = [CERTIFICATE, f"{SERVER}/registry.key", f"{SERVER}/htpasswd"]
READ_ONLY = {"REGISTRY_STORAGE_MAINTENANCE_READONLY": "{enabled: true}"}


def listener() -> dict[str, str]:
    """The environment of the one that can be written to."""
    return {
        "REGISTRY_HTTP_TLS_CERTIFICATE": "/tls/registry.pem",
        "REGISTRY_HTTP_TLS_KEY": "/tls/registry.key",
        "REGISTRY_AUTH": "htpasswd",
        "REGISTRY_AUTH_HTPASSWD_REALM": "registry",
        "REGISTRY_AUTH_HTPASSWD_PATH": "/tls/htpasswd",
    }


def files(member: Host) -> list[config.File]:
    """What a worker needs, to be a registry and to write to all of them."""
    data = member.data
    if not data.secure:
        return []
    where, pair = secrets.folder(data), certificates.certificate(member, "registry")
    secret = secrets.password(where, "registry")
    content = {
        **dict(zip(READS_AT_START, (pair.pem, pair.key, f"{USER}:{_hash(secret)}\n"), strict=True)),
        f"{CLIENT}/config.json": _logins(data, secret),
    }
    private = [config.File(path, text, mode="600") for path, text in content.items()]
    return [*private, *trusted(data, certificates.ca(where))]


def trusted(data: HostData, pem: str) -> list[config.File]:
    """Whose registries Docker and skopeo write to. Docker has no option for it: the folder's name is the
    registry's."""
    folders = (CLIENT, f"/etc/docker/certs.d/{data.address}:{data.registry_port}")
    return [config.File(f"{folder}/ca.crt", pem, mode="600") for folder in folders]


@cache
def _hash(secret: str) -> str:
    """bcrypt, with a salt that is the same in each run; nobody can tell it before they have the password."""
    salt = base64.b64encode(hashlib.sha256(secret.encode()).digest()).decode().replace("+", ".")[:21]
    return bcrypt.hashpw(secret.encode(), f"$2b$10${salt}.".encode()).decode()


def _logins(data: HostData, secret: str) -> str:
    login = base64.b64encode(f"{USER}:{secret}".encode()).decode()
    hosts = [f"{worker.data.address}:{data.registry_port}" for worker in inventory.get_group("workers")]
    return json.dumps({"auths": {host: {"auth": login} for host in hosts}}, indent=2) + "\n"


def request(data: HostData) -> dict[str, Any]:
    """What `requests` needs to read from the private address."""
    where = secrets.folder(data)
    if not data.secure:
        return {}
    return {"auth": (USER, secrets.password(where, "registry")), "verify": str(where / "ca.pem")}


def push_command(data: HostData, image: str) -> str:
    """Push `image`, which is named as the local Docker pulls it. Docker keeps no other name of it."""
    if not data.secure:
        return f"docker push -q {image}"
    there = image.replace("127.0.0.1:", f"{data.address}:", 1)
    push = f"docker --config {CLIENT} push -q {there}"
    return f"docker tag {image} {there} && {{ {push}; code=$?; docker rmi {there} >/dev/null; exit $code; }}"
