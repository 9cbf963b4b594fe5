"""The table of docs/faults.md, from the timelines of runs: python -m tests.faults.counts results/nomad"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def row(told: dict[str, Any]) -> str:
    """name | requests | failed, of which kind | for how long | slowest answer | seconds until whole"""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(told["failed_kinds"].items()))
    methods = "+".join(sorted(told["failed_methods"]))
    failed = f"{told['failed']}: {methods}, {kinds}" if told["failed"] else "0"
    lasted = f"{told['failing_s']:.1f} s" if told["failed"] else ""
    cells = (told["name"], f"{told['sent']:,}", failed, lasted, f"{told['slowest_s']:.1f} s", _healed(told))
    return f"| {' | '.join(cells)} |"


def _healed(told: dict[str, Any]) -> str:
    """From the last thing that was done to the hosts until all was whole."""
    times = {mark["says"]: mark["time"] for mark in told["marks"]}
    whole = times.pop("whole", None)
    return "never" if whole is None else f"{whole - max(times.values()):.0f} s"


def table(folder: Path) -> str:
    """Markdown; each fault beside the same during a release."""
    files = sorted(folder.glob("*.json"), key=lambda file: file.stem)
    head = [
        "| fault | requests | failed | failing for | slowest answer | whole again after |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *(row(json.loads(file.read_text())) for file in files)])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{table(Path(name))}\n")
