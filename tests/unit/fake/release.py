"""The real release.py on hosts whose registries and commands are world.json's (see world.py).

world: registries {host: {version: digest}}, source (of what is released), running (versions), full
(registries that take nothing), lost and silent (hosts), lost at build (hosts),
roll fails (why), build fails, no room.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pyinfra import host, local
from pyinfra.api import DeployError
from pyinfra.api.host import Host
from pyinfra.connectors.fake import FakeConnector
from pyinfra.connectors.util import CommandOutput, OutputLine

from tasks import distribute, held, history, image, lock, nomad_job, preflight, serving
from tests.unit.fake import world

DIGEST = "sha256:" + 64 * "a"


def digest(member: Host, version: str) -> str | None:
    now, name = world.load(), world.short(member)
    if name in now.get("silent", []):
        raise ConnectionRefusedError(111, "Connection refused")
    held: str | None = now["registries"].get(name, {}).get(version)
    return held


def run_shell_command(
    connector: FakeConnector, command: object, **arguments: object
) -> tuple[bool, CommandOutput]:
    line, name = str(command), world.short(connector.host)
    if "uname" in line:
        return True, CommandOutput([OutputLine("stdout", "x86_64")])
    if "is-active -q nomad" in line:  # no other scheduler runs the app
        return True, CommandOutput([])
    if "docker image inspect" in line:
        found = [OutputLine("stdout", '[{"Id": "1"}]')] * (name in world.load().get("pulled", []))
        return True, CommandOutput(found)
    fault = _act(connector.host, name, line)
    return fault is None, CommandOutput([OutputLine("stderr", fault)] if fault else [])


def _act(member: Host, name: str, line: str) -> str | None:
    now = world.load()
    if name in now.get("lost", []):
        raise EOFError
    if line == "true":
        return None
    world.note(_what(line), member, line)
    if "docker build" in line:
        if name in now.get("lost at build", []):
            world.save({**now, "lost": [name]})
            raise EOFError
        fault: str | None = now.get("build fails")
        return fault
    if match := re.search(r" push -q \S+:([^:;\s]+)", line):
        now["registries"].setdefault(name, {})[match[1]] = DIGEST
    if match := re.search(r"registry-sync fetch (\S+)$", line):
        if name in now.get("full", []):
            return "writing blob: no space left on device"
        now["registries"].setdefault(name, {})[match[1]] = DIGEST
    if match := re.search(r"registry-sync prune (.+)$", line):
        kept = now["registries"].get(name, {})
        now["registries"][name] = {v: d for v, d in kept.items() if d not in match[1].split()}
    if "docker pull" in line:
        now.setdefault("pulled", []).append(name)
    world.save(now)
    return None


def _what(line: str) -> str:
    for word in ("build", "push", "fetch", "pull", "prune"):
        if f" {word} " in line:
            return word
    return "shell"


def check(version: str) -> None:
    if fault := world.load().get("no room"):
        raise DeployError(f"{version}: {fault}")


def settled(version: str) -> bool:
    now = world.load()
    return bool(now.get("running") == [version] and now.get("count", 3) == host.data.app_count)


def release(version: str, say: Any) -> str | None:  # noqa: ANN401
    now = world.load()
    world.note("roll", host, version)
    fault: str | None = now.get("roll fails")
    world.save(now if fault else {**now, "running": [version], "count": host.data.app_count})
    return fault


def exactly(version: str) -> Any:  # noqa: ANN401
    def fault() -> str | None:
        world.note("verify", host, version)
        return None if world.load()["running"] == [version] else "another version serves"

    return fault


def ask(step: lock.Ask) -> object:
    """Consul keeps one key, the audit trail."""
    return step(Trail())  # type: ignore[arg-type]


class Trail:
    def __init__(self) -> None:
        self.kv = self

    def get(self, key: str) -> tuple[str, dict[str, Any] | None]:
        trail = world.load().get("trail")
        return "1", {"Value": json.dumps(trail), "ModifyIndex": len(trail)} if trail else None

    def put(self, key: str, value: str, cas: int) -> bool:
        assert key == history.KEY
        world.save({**world.load(), "trail": json.loads(value)})
        return True


def by_all() -> held.Images:
    kept: list[str] = world.load().get("held", [])
    return {version: held.Image(DIGEST, "here") for version in kept}


class Lock:
    lost = None

    def check(self) -> bool:
        return True

    def give_back(self) -> None:
        pass


host.data.address = world.short(host)
FakeConnector.run_shell_command = run_shell_command  # type: ignore[method-assign,assignment]
FakeConnector.put_file = lambda *_, **__: True  # type: ignore[method-assign,assignment]
distribute.digest = digest
distribute.catalogue = lambda member: world.load()["registries"].get(world.short(member), {})
nomad_job.stable_versions = lambda member=None: world.load().get("stable", [])
distribute.source = lambda member, version: world.load().get("source", "here")
image.source_hash = lambda folder: "here"
image.build_context = lambda folder, arch: b""
nomad_job.check, nomad_job.settled, nomad_job.release = check, settled, release
lock.ask, held.by_all = ask, by_all  # type: ignore[assignment]
lock.take = lambda ask, what, say: Lock()  # type: ignore[assignment,return-value]
serving.exactly = exactly
serving.running_versions = lambda: set(world.load().get("running", []))
preflight.make_secrets()
local.include("release.py")
