"""Nomad's gossip key: rotate.py replaces it through the key rings of the running servers, with no restart."""

from __future__ import annotations

from collections.abc import Callable, Generator

from nomad import Nomad
from pyinfra import host, logger
from pyinfra.api import FunctionCommand, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State

from tasks import secrets
from tasks.cluster import Unavailable, nomad_api

FILE = "gossip-nomad"


@operation()
def use_next_gossip_key() -> Generator[FunctionCommand]:
    """Every server learns the next key, then all encrypt with it; they still understand the one before."""
    yield FunctionCommand(_change, (_use_next,), {})


@operation()
def forget_old_gossip_keys() -> Generator[FunctionCommand]:
    """Then the next key becomes the current one."""
    yield FunctionCommand(_change, (_forget_old,), {})


def _change(state: State, host: Host, change: Callable[[Nomad, str], None]) -> bool:
    try:
        # No other token may see the keys.
        with nomad_api(host, "bootstrap") as api:
            change(api, secrets.gossip_key(secrets.folder(host.data), "nomad"))
    except Unavailable as error:
        said = getattr(getattr(error, "nomad_resp", None), "text", "") or error
        logger.error(f"{host.print_prefix}Nomad's key ring: {said}; repair that and run rotate.py again")
        return False
    return True


def _use_next(api: Nomad, key: str) -> None:
    """Nomad answers 500 when one server does not follow: then nobody uses the key yet."""
    _ring(api, "install", key)
    _ring(api, "use", key)


def _forget_old(api: Nomad, key: str) -> None:
    for old in set(_keys(api)) - {key}:
        _ring(api, "remove", old)
    secrets.finish(secrets.folder(host.data), [FILE])


def _keys(api: Nomad) -> dict[str, int]:
    """Key -> how many servers have it."""
    found: dict[str, int] = api.agent.request("keyring", "list", method="get").json()["Keys"]
    return found


def _ring(api: Nomad, change: str, key: str) -> None:
    api.agent.request("keyring", change, json={"Key": key}, method="put")
