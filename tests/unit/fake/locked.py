"""One operation under the lock; whether it can be had, and whether the operation fails, world.json says."""

from pyinfra import host, state
from pyinfra.api.host import Host
from pyinfra.operations import server

from tasks import lock, preflight, rolling
from tests.unit.fake import world


class Lock:
    lost = None

    def __init__(self, member: Host) -> None:
        self.member = member  # after a failed run no host is at hand any more

    def give_back(self) -> None:
        world.note("given back", self.member)


def take(ask: lock.Ask, what: str, say: lock.Say) -> Lock:
    now = world.load()
    if now.get("held by"):
        raise lock.Held(now["held by"])
    if now.get("silent"):
        raise ConnectionRefusedError("refused")
    world.note("taken", host)
    return Lock(state.inventory.get_host(host.name))


lock.take = take  # type: ignore[assignment]

preflight.stop_at_first_failure(name="Stop at the first failure")
lock.hold(name="Let no other run begin", what="test", needed=world.load().get("needed", True))
if not rolling.driver():
    server.shell(name="Go ahead", commands=["go ahead"])
server.shell(name="Go on", commands=["go on"])
lock.give_back(name="Let the next run begin")
