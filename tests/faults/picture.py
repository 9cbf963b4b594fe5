"""Draws a timeline: python -m tests.faults.picture results/nomad/release.json docs/release.svg"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Text stays text, and the same data make the same file: names instead of random ones, and no date.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "timeline", "font.size": 8})

COLOURS = ("#4878cf", "#6acc65", "#956cb4", "#c4ad66")
FAILED = "#d62728"
LANES = ("Nomad", "Consul", "HAProxy", "keepalived", "systemd")


def draw(source: Path, target: Path) -> None:
    """The JSON of a Timeline -> an SVG: requests, how long they took, and what happened."""
    told = json.loads(source.read_text())
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    requests, latency, events = figure.subplots(3, sharex=True, gridspec_kw={"height_ratios": [3, 1.5, 2.5]})
    title = f"{told['name']}: {told['sent']} requests, {told['failed']} failed ({told['scheduler']})"
    figure.suptitle(title, fontsize=10)
    _draw_requests(requests, told["seconds"])
    _draw_latency(latency, told["seconds"])
    _draw_events(events, told["events"])
    events.set_xlabel("seconds")
    for axes in (requests, latency, events):
        for mark in told["marks"]:
            axes.axvline(mark["time"], color="black", linewidth=0.8, linestyle=":")
    for number, mark in enumerate(told["marks"]):
        # One under the other where they come close.
        height = 0.92 - 0.07 * (number % 4)
        requests.text(mark["time"], height, f" {mark['says']}", transform=requests.get_xaxis_transform())
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})


def _draw_requests(axes: Axes, seconds: list[dict[str, Any]]) -> None:
    """Answers by version as bands, those that name none above, failures in red on top."""
    versions = sorted({version for second in seconds for version in second["versions"]})
    at = list(range(len(seconds)))
    bottom = [0.0] * len(seconds)
    # Only some answers tell their version: its share of them is its share of all.
    for version, colour in zip(versions, COLOURS, strict=False):
        height = [_share(second, version) for second in seconds]
        axes.bar(at, height, 1, bottom, align="edge", color=colour, label=version)
        bottom = [low + high for low, high in zip(bottom, height, strict=True)]
    failed = [second["failed"] for second in seconds]
    axes.bar(at, failed, 1, bottom, align="edge", color=FAILED, label="failed")
    axes.set_ylabel("requests/s")
    axes.set_ylim(0, 1.35 * max((second["sent"] for second in seconds), default=1))
    axes.legend(loc="lower right", ncols=5, framealpha=0.9)


def _share(second: dict[str, Any], version: str) -> float:
    told = sum(second["versions"].values())
    well = second["sent"] - second["failed"]
    return float(well * second["versions"].get(version, 0) / told) if told else 0.0


def _draw_latency(axes: Axes, seconds: list[dict[str, Any]]) -> None:
    axes.step(
        range(len(seconds)), [s["slowest_s"] for s in seconds], where="post", color="black", linewidth=0.8
    )
    axes.set_yscale("log")
    axes.set_ylabel("slowest answer, s")


def _draw_events(axes: Axes, events: list[dict[str, Any]]) -> None:
    """One lane for each source: a stroke for each event, and words where there is room."""
    lanes = [lane for lane in LANES if any(event["source"] == lane for event in events)]
    for lane, source in enumerate(lanes):
        mine = [event for event in events if event["source"] == source]
        axes.plot([event["time"] for event in mine], [lane] * len(mine), "|", color=COLOURS[0], markersize=10)
        room = axes.get_xlim()[1] / 14  # three lines of words, each as wide as three of these
        for number, event in enumerate(_far_apart(mine, room)):
            words = f"{event['host']}: {event['says']}"
            height = lane + (0.16, 0.34, 0.52)[number % 3]
            axes.text(event["time"], height, words[:60], fontsize=6, clip_on=True)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(-0.4, len(lanes) - 0.2)


def _far_apart(events: list[dict[str, Any]], least_s: float) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for event in events:
        if not kept or event["time"] - kept[-1]["time"] >= least_s:
            kept.append(event)
    return kept


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
