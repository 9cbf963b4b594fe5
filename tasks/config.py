"""Small files on a host: all of a role's at once, after one look, and each by a rename.

pyinfra's files.put and files.template look several times per file, copy over the live file, and print
what they write under --diff. Here an interrupted run never leaves half a file, a secret is never shown,
and a second run asks each host one question per role.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from pyinfra import host, inventory
from pyinfra.api import FactBase, StringCommand, operation
from pyinfra.api.util import get_template


@dataclass(frozen=True)
class File:
    """A file as it should be: mode as stat prints it, owner as user:group; text ends with a line break."""

    dest: str
    text: str
    mode: str = "644"
    owner: str = "root:root"

    def line(self) -> str:
        """As the fact `Found` describes such a file."""
        return f"{self.mode} {self.owner} {hashlib.sha256(self.text.encode()).hexdigest()}"


class Found(FactBase[dict[str, str]]):
    """Path -> "mode user:group sha256" of those files that exist."""

    default = dict  # none of them: no output

    def command(self, paths: list[str]) -> str:
        return (
            f"for f in {shlex.join(paths)}; do"
            ' test ! -f "$f" || echo "$f" $(stat -c "%a %U:%G" "$f") $(sha256sum < "$f"); done'
        )

    def process(self, output: Iterable[str]) -> dict[str, str]:
        rows = (line.split() for line in output)
        return {row[0]: " ".join(row[1:4]) for row in rows}


def render(template: str, **values: object) -> str:
    """A file of templates/ with `host` and `inventory` and these values filled in."""
    jinja = get_template(f"templates/{template}", {"trim_blocks": True, "lstrip_blocks": True})
    return jinja.render(host=host, inventory=inventory, **values)


@operation()
def write(files: list[File]) -> Generator[StringCommand]:
    """Write the files that are missing or differ in content, mode or owner.

    The text goes through standard input. An upload would lie in /tmp, readable for all, before it is
    moved to its place; and it takes four round trips instead of one.
    """
    found = host.get_fact(Found, paths=[file.dest for file in files])
    differing = [file for file in files if found.get(file.dest) != file.line()]
    if not differing:
        host.noop("all files are as they should be")
    for file in differing:
        yield replace(file)


def replace(file: File) -> StringCommand:
    """Its time is that of the rename: a service that started meanwhile has not read it."""
    new = f"{file.dest}.new"
    return StringCommand(
        f"mkdir -p {PurePosixPath(file.dest).parent} && install -m 600 /dev/null {new} && cat > {new}"
        f" && chown {file.owner} {new} && chmod {file.mode} {new} && touch {new} && mv -T {new} {file.dest}",
        _stdin=file.text,
    )


@operation()
def create_user(user: str) -> Generator[str]:
    """Create a system user that owns /var/lib/<user> and cannot log in.

    pyinfra's server.user reads every account and group of the host first: 0.4 to 0.8 s in each run.
    """
    if host.get_fact(UserExists, user=user):
        host.noop(f"user {user} exists")
        return
    yield f"echo 'u {user} - - /var/lib/{user}' | systemd-sysusers -"


class UserExists(FactBase[bool]):
    """Whether an account exists."""

    def command(self, user: str) -> str:
        return f"getent passwd {shlex.quote(user)} || true"

    def process(self, output: Iterable[str]) -> bool:
        return bool(list(output))
