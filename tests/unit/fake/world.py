"""Hosts that exist only in a folder: world.json says how each answers, journal what was done to them.

pyinfra runs for real against its own @fake connector. What a host answers depends on world.json, and a
restart changes it there, so that a second run finds what the first has left.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import IO, Any

from pyinfra.api.host import Host
from pyinfra.connectors.fake import FakeConnector
from pyinfra.connectors.util import CommandOutput, OutputLine

FOLDER = Path(os.environ.get("FAKE_WORLD", "."))


def load() -> dict[str, Any]:
    world: dict[str, Any] = json.loads((FOLDER / "world.json").read_text())
    return world


def save(world: dict[str, Any]) -> None:
    (FOLDER / "world.json").write_text(json.dumps(world))


def note(what: str, host: Host, detail: str = "") -> None:
    with (FOLDER / "journal").open("a") as journal:
        print(what, short(host), detail, file=journal)


def short(host: Host) -> str:
    return host.name.removeprefix("@fake/")


def run_shell_command(
    connector: FakeConnector, command: object, **arguments: object
) -> tuple[bool, CommandOutput]:
    """In place of the connector's own, whose answers cannot depend on what happened before."""
    name, line, world = short(connector.host), str(command), load()
    sudo = "sudo" if arguments.get("_sudo") else "user"
    if "is-enabled" in line:
        note("asked", connector.host, sudo)
        return _answer(world["state"].get(name, "fresh"))
    if "systemctl restart" in line:
        note("restart", connector.host, sudo)
        return _restart(world, name)
    if "addr show to" in line and "grep -q . && echo" in line:  # vip.Holder
        return _answer(world.get("answers at the vip", ""))
    if "addr show to" in line and "grep -q ." in line:  # vip.holds
        return _answer(success=name == world.get("holder"))
    known = {**DEBIAN, **world.get("answers", {}).get(name, {})}
    for part, lines in known.items():
        if part in line:
            return _answer(*lines)
    if arguments.get("_stdin"):
        return _keep(connector.host, line, str(arguments["_stdin"]))
    note("shell", connector.host, line)
    return _answer(success=name not in world.get(f"fails: {line}", []))


DEBIAN = {
    "-release": [
        "/etc/os-release",
        "ID=debian",
        'VERSION_ID="12"',
        'PRETTY_NAME="Debian GNU/Linux 12"',
        "---",
    ],
    "uname -m": ["x86_64"],
    "is-active -q nomad": [],  # nothing runs the app yet
    "is-active keepalived": [],
    "ip -o -4 addr": [],  # no other address than that of the inventory
    "for tool in": [f"{tool} present 1.0.0" for tool in ("consul", "nomad", "consul-template")],
}


def _restart(world: dict[str, Any], name: str) -> tuple[bool, CommandOutput]:
    if name in world.get("restart fails", []):
        return False, CommandOutput([OutputLine("stderr", "Job for consul.service failed.")])
    world["state"][name] = "fresh"
    world["leader"] = world.get("leader after", {}).get(name, world.get("leader"))
    save(world)
    return _answer()


def _answer(*lines: str, success: bool = True) -> tuple[bool, CommandOutput]:
    return success, CommandOutput([OutputLine("stdout", line) for line in lines])


def _keep(host: Host, line: str, text: str) -> tuple[bool, CommandOutput]:
    """What config.write sends, as <folder>/<host>/<path>."""
    kept = FOLDER / short(host) / re.findall(r"mv -T \S+ (\S+)", line)[0].lstrip("/")
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(text)
    return _answer()


def put_file(
    connector: FakeConnector, source: str | IO[str], target: str, *_: object, **arguments: object
) -> bool:
    """Keep what is uploaded, as <folder>/<host>/<path>."""
    kept = FOLDER / short(connector.host) / target.lstrip("/")
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(Path(source).read_text() if isinstance(source, str) else source.read())
    return True


FakeConnector.put_file = put_file  # type: ignore[method-assign,assignment]
FakeConnector.run_shell_command = run_shell_command  # type: ignore[method-assign,assignment]
