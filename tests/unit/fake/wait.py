"""Wait for what world.json says is missing; it asks once more after each answer is used up."""

from pyinfra import host
from pyinfra.operations import server

from tasks import preflight, rolling
from tests.unit.fake import world


def fault() -> str | None:
    now = world.load()
    world.note("fault", host)
    missing: str | None = now["missing"].pop(0) if now["missing"] else None
    world.save(now)
    return missing


preflight.stop_at_first_failure(name="Stop at the first failure")
if rolling.driver():
    rolling.wait_until_healthy(name="Wait until Consul has a leader", what="a Consul leader", fault=fault)
server.shell(name="Go on", commands=["go on"])
