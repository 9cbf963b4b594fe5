"""Roll a service whose cluster answers as world.json says, then run one more operation everywhere."""

import os
import signal
from collections.abc import Callable

from pyinfra.api.host import Host
from pyinfra.operations import server

from tasks import preflight, rolling
from tests.unit.fake import world


def rank(member: Host) -> int:
    now = world.load()
    if world.short(member) in now.get("no rank", []):
        raise ConnectionResetError("connection reset")
    if world.short(member) in now.get("sick", []):
        return 0
    return 2 if world.short(member) == now.get("leader") else 1


def gate(member: Host) -> str | None:
    world.note("gate", member)
    if hopeless := world.load().get("hopeless"):
        raise rolling.NeverOpens(hopeless)
    answer: str | None = world.load().get("gate", {}).get(world.short(member))
    return answer


def recovery(member: Host) -> Callable[[], str | None]:
    now = world.load()
    if now.get("killed before") == world.short(member):
        os.kill(os.getpid(), signal.SIGKILL)
    if world.short(member) in now.get("silent", []):
        raise ConnectionResetError("connection reset")
    asked = iter(["its log is behind"] * now.get("slow", 0))

    def check() -> str | None:
        lost = world.short(member) in now.get("lost", [])
        missing = "not a healthy voter" if lost else next(asked, None)
        world.note("well" if missing is None else "unwell", member)
        return missing

    return check


SERVICE = rolling.Service(
    unit="consul",
    files=["/etc/consul.d/consul.hcl"],
    rank=rank,
    gate=gate,
    recovery=recovery,
    group=world.load().get("group", "workers"),
)

preflight.stop_at_first_failure(name="Stop at the first failure")
if rolling.driver():
    rolling.roll(name="Restart Consul where it is stale, one host at a time", service=SERVICE)
server.shell(name="Go on", commands=["go on"])
