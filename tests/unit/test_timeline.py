"""What the fault tests write down: nothing that failed is left out, and the same run is the same picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults import counts, picture
from tests.faults.faults import FAILOVER, IN_FLIGHT, NOTHING, MayFail
from tests.faults.timeline import Event, Timeline, _by_second, _once
from tests.load import Answer

TOLD: dict[str, Any] = {
    "name": "worker powered off",
    "scheduler": "nomad",
    "sent": 1234,
    "failed": 2,
    "failed_methods": {"POST": 2},
    "failed_kinds": {"status 502": 2},
    "failing_s": 0.3,
    "slowest_s": 2.0,
    "seconds": [
        {"sent": 10, "failed": 0, "slowest_s": 0.1, "versions": {"0.0.2": 5}},
        {"sent": 10, "failed": 2, "slowest_s": 2.0, "versions": {"0.0.2": 3, "0.0.3": 1}},
    ],
    "marks": [
        {"time": 0.5, "says": "worker powered off (worker-01)"},
        {"time": 1.0, "says": "mended"},
        {"time": 9.0, "says": "whole"},
    ],
    "events": [{"time": 0.7, "source": "HAProxy", "host": "proxy-01", "says": "app-1 is DOWN"}],
}


def answer(start: float, method: str = "GET", failure: str | None = None, version: str = "0.0.2") -> Answer:
    return Answer(start, 0.01, method, "new", version if failure is None else None, failure)


def test_each_second_has_what_was_sent_in_it() -> None:
    first, second = _by_second([answer(0.1), answer(0.9, failure="timeout"), answer(1.5), answer(2.0)])
    assert (first["sent"], first["failed"], first["versions"]) == (2, 1, {"0.0.2": 1})
    assert (second["sent"], second["failed"]) == (1, 0)


def test_what_haproxy_says_twice_is_one_event() -> None:
    down = Event(1.0, "HAProxy", "proxy-01", "app-1 is DOWN")
    later, elsewhere = down._replace(time=9.0), down._replace(host="proxy-02")
    assert _once([down, down._replace(time=1.2), elsewhere, later]) == [down, elsewhere, later]


@pytest.mark.parametrize(
    ("may_fail", "failed", "excused"),
    [
        (NOTHING, answer(4.9, "POST", "status 502"), False),
        (IN_FLIGHT, answer(4.9, "POST", "status 502"), True),
        (IN_FLIGHT, answer(4.9, "GET", "status 502"), False),
        (IN_FLIGHT, answer(5.1, "POST", "status 502"), False),
        (FAILOVER, answer(7.9, "GET", "connection refused"), True),
        (FAILOVER, answer(8.1, "GET", "connection refused"), False),
        (FAILOVER, answer(5.1, "GET", "wrong body"), False),
    ],
)
def test_a_fault_at_5_s_excuses_no_more_than_it_may(may_fail: MayFail, failed: Answer, excused: bool) -> None:
    timeline = Timeline("x", {"0.0.2"})
    timeline.answers = [answer(5), failed]
    assert timeline.not_excused(may_fail, 5.0) == ([] if excused else [failed])


def test_an_event_is_read_from_the_journal() -> None:
    timeline = Timeline("x", {"0.0.2"})
    timeline._wall = 1000.0
    line = "1002.5 proxy-01 haproxy[7]: Server app/app-0.0.2-10.0.0.1-20001 is DOWN, reason: Layer4 timeout"
    assert timeline._event("proxy-01", line) == Event(
        2.5, "HAProxy", "proxy-01", "app-0.0.2-10.0.0.1-20001 is DOWN"
    )
    assert timeline._event("proxy-01", "1002.5 proxy-01 haproxy[7]: Loading success.") is None
    assert timeline._event("proxy-01", "-- Boot 0123 --") is None


def test_the_table_counts_what_failed() -> None:
    assert counts.row(TOLD) == (
        "| worker powered off | 1,234 | 2: POST, 2 status 502 | 0.3 s | 2.0 s | 8 s |"
    )


def test_the_same_run_is_the_same_small_picture(tmp_path: Path) -> None:
    source = tmp_path / "told.json"
    source.write_text(json.dumps(TOLD))
    for name in ("a.svg", "b.svg"):
        picture.draw(source, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes()
    assert b"1234 requests, 2 failed" in drawn
    assert b"<dc:date>" not in drawn
    assert len(drawn) < 200_000
