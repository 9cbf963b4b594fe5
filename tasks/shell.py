"""A shell command on any host of the run, from wherever the code runs that acts on several of them."""

from __future__ import annotations

from typing import Any

from pyinfra.api.arguments import CONNECTOR_ARGUMENT_KEYS
from pyinfra.api.host import Host
from pyinfra.connectors.util import CommandOutput


def run(member: Host, command: str, **arguments: Any) -> tuple[bool, CommandOutput]:  # noqa: ANN401
    """Whether it succeeded, and what it printed. Raises what a lost connection raises.

    Operations take _sudo, _sudo_password and the like from the host's data; a call like this does not.
    """
    return member.run_shell_command(command, **how(member), **arguments)


def how(member: Host) -> dict[str, Any]:
    """The arguments of a connector's calls that the host's data has: _sudo and the like."""
    data = member.data.dict()
    return {key: data[key] for key in CONNECTOR_ARGUMENT_KEYS if key in data}


def fault(member: Host, command: str) -> str | None:
    """The last line of what it complains about, or None if it succeeded."""
    ok, output = run(member, command)
    return None if ok else (output.stderr_lines or output.stdout_lines or ["no message"])[-1].strip()
