"""Run a command, as root where that is needed, and tell how long a stage took."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lab.settings import ROOT, LabError

SUDO = () if os.geteuid() == 0 else ("sudo",)
# Where Debian has dockerd; an ordinary user's path may lack it.
PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
ENV = {"PATH": PATH, "PYINFRA_YES": "1", "VAGRANT_CHECKPOINT_DISABLE": "1"}


class Failed(LabError):
    """A command failed; the error is the last line of what it complains about."""

    def __init__(self, argv: tuple[str, ...], output: str) -> None:
        lines = output.strip().splitlines() or ["no message"]
        super().__init__(f"`{shlex.join(argv)}` failed: {lines[-1]}")
        self.output = output


def run(*argv: str, env: dict[str, str] | None = None) -> None:
    """Run in the project's folder, output to the terminal. Raises LabError."""
    try:
        process = subprocess.Popen(argv, cwd=ROOT, env=os.environ | ENV | (env or {}))
    except FileNotFoundError:
        raise LabError(f"{argv[0]} is missing: install it, and run again") from None
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal interrupts it, too: let it tidy up
        raise
    if status:
        raise LabError(f"`{shlex.join(argv)}` failed with exit code {status}: see above")


def quietly(*argv: str) -> None:
    """Run in the project's folder; its output is shown only if it fails. Raises LabError."""
    try:
        output(*argv)
    except Failed as error:
        print(error.output, flush=True)
        raise LabError(f"`{shlex.join(argv)}` failed: see above") from None


def output(*argv: str) -> str:
    """What the command prints. Raises LabError with the last line of what it complains about."""
    try:
        done = subprocess.run(argv, cwd=ROOT, env=os.environ | ENV, capture_output=True, text=True)
    except FileNotFoundError:
        raise LabError(f"{argv[0]} is missing: install it, and run again") from None
    if done.returncode:
        raise Failed(argv, done.stdout + done.stderr)
    return done.stdout


def succeeds(*argv: str) -> bool:
    """True if the command is there and exits with 0."""
    try:
        output(*argv)
    except LabError:
        return False
    return True


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Say what is done now, and at its end how long it took."""
    print(f"==> {what}", flush=True)
    start = time.monotonic()
    yield
    print(f"    done in {time.monotonic() - start:.0f} s", flush=True)
