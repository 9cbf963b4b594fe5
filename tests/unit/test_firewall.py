"""The port table: what docs/ports.md says is what the rules have, and rules that nft accepts."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import group_data.all
from tasks.firewall import Opening, openings

DOCS = (Path(__file__).parents[2] / "docs" / "ports.md").read_text()
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split("|")) for line in DOCS.splitlines() if "|" in line
]


def data(**values: object) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(group_data.all), **values})


def test_the_documented_table_is_the_one_in_force() -> None:
    rows = [
        (o.group, o.protocol, o.ports, ", ".join(o.sources) or "anyone", o.what)
        for o in openings(data())  # type: ignore[arg-type]
    ]
    assert ROWS[3:] == rows
    assert ROWS[2][:4] == ("hosts", "tcp", str(group_data.all.firewall_ssh_port), "anyone")


@pytest.mark.parametrize("port", ["4647", "4648"])
def test_without_nomad_its_ports_are_closed(port: str) -> None:
    assert port not in {o.ports for o in openings(data(scheduler="docker"))}  # type: ignore[arg-type]


def test_what_a_packet_must_match() -> None:
    opening = Opening("workers", "tcp", "5000", ("workers", "10.0.0.5", "fd00::/8"), "")
    assert opening.rules() == [
        "meta l4proto tcp ct original proto-dst { 5000 } ip saddr @workers",
        "meta l4proto tcp ct original proto-dst { 5000 } ip saddr 10.0.0.5",
        "meta l4proto tcp ct original proto-dst { 5000 } ip6 saddr fd00::/8",
    ]


def test_extra_openings_are_for_anyone_by_default() -> None:
    extra = openings(data(firewall_extra=[{"protocol": "tcp", "ports": 9100}]))[-1]  # type: ignore[arg-type]
    assert extra.rules() == ["meta l4proto tcp ct original proto-dst { 9100 }"]
