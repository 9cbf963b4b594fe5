"""pyinfra against hosts that exist only in a folder (see fake/world.py)."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FAKE = ROOT / "tests" / "unit" / "fake"


@dataclass
class Run:
    """One run of pyinfra: its exit code, what it printed, and what was done to the hosts."""

    code: int
    stderr: str
    results: dict[str, Any]
    journal: list[str]

    def done(self, what: str) -> list[str]:
        """The hosts that something happened to, in order."""
        return [line.split()[1] for line in self.journal if line.startswith(f"{what} ")]

    def errors(self) -> list[str]:
        """Our own lines about a failure; pyinfra's closing lines begin with an arrow."""
        lines = re.sub(r"\x1b\[[0-9;]*m", "", self.stderr).splitlines()
        return [line.strip() for line in lines if re.search("restarted|touched|journalctl", line)]

    def changed(self) -> dict[str, list[str]]:
        """Operation -> the hosts it changed or failed on; operations without any are left out."""
        operations = self.results["operations"]
        hosts = {op["name"]: sorted(op["success"] + op["error"]) for op in operations}
        return {name: names for name, names in hosts.items() if names}


def run(folder: Path, deploy: str | Path, *arguments: str, **world: object) -> Run:
    """Run a deploy file on the hosts of `folder`/world.json; without `world` as the last run left them."""
    if world:
        (folder / "world.json").write_text(json.dumps({"state": {}, **world}))
    (folder / "journal").write_text("")
    environment = {"FAKE_WORLD": str(folder), "PYINFRA_FAKE_DELAY": "0", "PYINFRA_FAKE_DELAY_JITTER": "0"}
    inventory = str(FAKE / "inventory.py")
    command = [sys.executable, "-m", "pyinfra", "-y", "--json", *arguments, inventory, str(FAKE / deploy)]
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    results = json.loads(ran.stdout)["results"] if ran.stdout.startswith("{") else {}
    return Run(ran.returncode, ran.stderr, results, (folder / "journal").read_text().splitlines())


@pytest.fixture
def pyinfra(tmp_path: Path) -> Callable[..., Run]:
    """`run` in a folder of this test's own."""
    return partial(run, tmp_path)
