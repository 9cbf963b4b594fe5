"""The cluster's secrets, in a folder of the controller: made once, then only read.

The folder (knob secrets_folder) is 0700, its files are 0600. A file `made` lists what was made, so that
one that got lost is an error and never becomes a new secret, which would lock us out of the cluster.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import os
import secrets
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pyinfra.api import DeployError
from pyinfra.api.host import HostData

ROOT = Path(__file__).resolve().parent.parent
MADE = "made"
NEXT = ".next"  # ends the name of what is about to replace a file; see rotate.py


class Missing(DeployError):
    """One line: which file is missing, and what to do."""


def _gossip_key() -> str:
    """32 random bytes, base64: what Consul and Nomad take for AES-256."""
    return base64.b64encode(secrets.token_bytes(32)).decode()


def _token() -> str:
    return str(uuid.uuid4())


# File -> what makes it. A new line is made by the next deploy.py.
WANTED: dict[str, Callable[[], str]] = {
    "gossip-consul": _gossip_key,
    "gossip-nomad": _gossip_key,
    "token-consul-bootstrap": _token,
    "token-consul-agent": _token,  # see agent_token
    "token-consul-dns": _token,
    "token-consul-template": _token,
    "token-consul-nomad": _token,
    "token-consul-registration": _token,
    "token-consul-release": _token,
    "token-consul-status": _token,
    "token-nomad-bootstrap": _token,
    "password-registry": lambda: secrets.token_urlsafe(24),
}


def folder(data: HostData) -> Path:
    """Where the secrets are; a relative path begins at the project."""
    return ROOT / str(data.secrets_folder)


def make(where: Path) -> None:
    """Make what was never made. Raises Missing for a file that was made and is gone."""
    make_once(where, WANTED)


def make_once(where: Path, wanted: Mapping[str, Callable[[], str]]) -> None:
    """Make those of `wanted` that were never made, in this order; a file that is there is kept."""
    with _locked(where):
        known = made(where)
        for name in known:
            if not (where / name).exists():
                raise Missing(_missing(where, name))
        for name, new in wanted.items():
            if not (where / name).exists():
                write(where, name, new())
        if new_names := [name for name in wanted if name not in known]:
            write(where, MADE, "\n".join([*known, *new_names]))


def gossip_key(where: Path, tool: str) -> str:
    """For a host. tool: consul or nomad. 32 bytes, base64."""
    return coming(where, f"gossip-{tool}")


def token(where: Path, name: str) -> str:
    """For a host: a UUID. name: as in WANTED, such as "consul-dns". The controller's own: `own_token`."""
    return coming(where, f"token-{name}")


def own_token(where: Path, name: str) -> str:
    """What the controller itself shows; until the end of a rotation that is the one before."""
    return read(where, f"token-{name}")


def refused(name: str) -> str:
    """What to say when the cluster does not know a token of ours. name: as for token."""
    return f"it refuses token-{name} of secrets_folder: the cluster was made with another one, restore that"


def agent_token(where: Path, node: str, key: str = "") -> str:
    """The token of the Consul agent on `node`: a UUID of its own, derived, so that hosts may come and go."""
    key = key or token(where, "consul-agent")
    digest = hmac.new(key.encode(), node.encode(), hashlib.sha256).digest()
    return str(uuid.UUID(bytes=digest[:16], version=4))


def password(where: Path, name: str) -> str:
    """name: registry."""
    return read(where, f"password-{name}")


# A rotation: the next ones are made, the cluster learns them beside the current ones, the hosts get them,
# they become the current ones. Whatever ends a run, the next rotate.py goes on with the same ones.


def begin(where: Path, names: Iterable[str]) -> None:
    """Make the next one of each, where that is not done yet."""
    with _locked(where):
        for name in names:
            if not (where / f"{name}{NEXT}").exists():
                write(where, f"{name}{NEXT}", WANTED[name]())


def coming(where: Path, name: str) -> str:
    """What the hosts shall hold: the next one where there is one. Raises Missing."""
    return read(where, f"{name}{NEXT}" if (where / f"{name}{NEXT}").exists() else name)


def finish(where: Path, names: Iterable[str]) -> None:
    """The next ones become the current ones."""
    for name in names:
        if (where / f"{name}{NEXT}").exists():
            (where / f"{name}{NEXT}").rename(where / name)


def unfinished(where: Path) -> list[str]:
    """What a rotation that was cut off has left to be done."""
    return sorted(file.name.removesuffix(NEXT) for file in where.glob(f"*{NEXT}"))


def read(where: Path, name: str) -> str:
    """The content of a file, without the line's end. Raises Missing."""
    try:
        return (where / name).read_text().strip()
    except FileNotFoundError:
        raise Missing(_missing(where, name)) from None


def _missing(where: Path, name: str) -> str:
    if not where.exists():
        return f"{where} is missing: run deploy.py, or bring it from the machine that did"
    return (
        f"{where / name} is missing: restore it from your backup. A new one would not fit the running"
        f" cluster; only for new hosts, delete {where} and run deploy.py"
    )


def write(where: Path, name: str, text: str) -> None:
    """Replace a file in one step; nobody but its owner can ever read it."""
    file = where / name
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
        new.write(text.rstrip("\n") + "\n")
        new.flush()
        os.fsync(new.fileno())  # a power cut must not leave an empty file under the name
    part.rename(file)


def made(where: Path) -> list[str]:
    """The files that were made, or taken over when they were there first."""
    file = where / MADE
    return file.read_text().split() if file.exists() else []


@contextmanager
def _locked(where: Path) -> Iterator[None]:
    """Two runs that begin together must not make two different secrets."""
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    where.chmod(0o700)
    with (where / ".lock").open("a") as lock:
        os.fchmod(lock.fileno(), 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
