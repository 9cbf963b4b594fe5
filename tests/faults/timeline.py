"""What happened when while something was broken under load, written as JSON and as a picture."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

from group_data import all as knobs
from tests.faults import picture
from tests.faults.faults import MayFail
from tests.lab import hosts
from tests.lab.test_proxies import VIP
from tests.load import Answer, Load

RESULTS = hosts.ROOT / "results" / hosts.SCHEDULER
URL = f"http://{VIP}:{knobs.haproxy_http_port}" if VIP else hosts.URL
RATE = 100  # requests per second
NEVER_EXCUSED = ("wrong body", "wrong version", "bytes that nobody asked for")

# Lines of the hosts' journals that are worth telling: of which program, the pattern, and what it says.
_TOLD = [
    ("Consul", "consul", r"server: cluster leadership acquired", "leads"),
    ("Consul", "consul", r"serf: EventMemberFailed: ([\w-]+) ", r"\1 has failed"),
    ("Consul", "consul", r"Check is now critical", "a check fails"),
    ("Nomad", "nomad", r"nomad: cluster leadership acquired", "leads"),
    ("Nomad", "nomad", r"node TTL expired", "misses a client"),
    ("Nomad", "nomad", r"task=app type=Started", "starts an instance"),
    ("Nomad", "nomad", r"task=app type=(Killing|Terminated)", "stops an instance"),
    ("HAProxy", "haproxy", r"Server \w+/(\S+) is (UP|DOWN)", r"\1 is \2"),
    ("HAProxy", "haproxy-apply", r"haproxy-apply: worker \d+ (runs with \d+ servers)", r"\1"),
    ("HAProxy", "haproxy-apply", r"haproxy-apply: (?!worker)(.*)", r"\1"),
    ("keepalived", "Keepalived_vrrp", r"Entering (\w+) STATE", r"\1"),
    ("systemd", "systemd", r"([\w-]+)\.service: Main process exited, code=(?!exited, status=0)", r"\1 died"),
    ("systemd", "systemd", r"Stopped ([\w-]+)\.service", r"\1 stopped"),
    ("systemd", "systemd", r"Started ([\w-]+)\.service", r"\1 started"),
]
_UNITS = ("consul", "nomad", "docker", "haproxy", "haproxy-apply", "consul-template", "keepalived")


class Event(NamedTuple):
    """time: seconds since the load began. source: Nomad, Consul, HAProxy, keepalived or systemd."""

    time: float
    source: str
    host: str
    says: str


@dataclass
class Mark:
    """Something that the test did or waited for. time: seconds since the load began."""

    time: float
    says: str


class Timeline:
    """Load on the app from entering its `with` block to leaving it, and all that happened meanwhile.

    versions: those that may answer.
    """

    def __init__(self, name: str, versions: set[str]) -> None:
        self.name = name
        self.answers: list[Answer] = []
        self.marks: list[Mark] = []
        self.events: list[Event] = []
        self.load = Load(URL, rate=RATE, versions=versions, tell=self.answers.append)

    def __enter__(self) -> Timeline:
        self._wall, self._begin = time.time(), time.monotonic()
        self.load.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.load.stop()
        self.events = self._events()
        self._write()
        print(f"{self.name}: {self.load.result}")

    def now(self) -> float:
        return self.since_begin(time.monotonic())

    def since_begin(self, moment: float) -> float:
        return moment - self._begin

    def mark(self, says: str) -> float:
        """Note it; the time."""
        self.marks.append(Mark(self.now(), says))
        return self.marks[-1].time

    def go_on(self, seconds: float) -> None:
        """Until there was load for so much longer, and an answer at its end."""
        end = self.now() + seconds

        def answered() -> bool:
            return any(a.start > end and not a.failure for a in reversed(self.answers[-50:]))

        hosts.wait_for("the load to go on and be answered", answered, seconds + 60)

    def failures(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.failure]

    def not_excused(self, may_fail: MayFail, fault_at: float) -> list[Answer]:
        """The failures that the fault, at this time, does not excuse."""
        return [
            a
            for a in self.failures()
            if a.method not in may_fail.methods
            or a.start > fault_at + may_fail.within_s
            or a.failure in NEVER_EXCUSED
        ]

    def saw(self, sign: str, since: float) -> bool:
        return any(e.time > since - 1 and re.search(sign, f"{e.source}: {e.says}") for e in self.events)

    def _events(self) -> list[Event]:
        units = " ".join(f"-u {unit}" for unit in _UNITS)
        read = f"journalctl -q --no-pager -o short-unix --since @{self._wall:.0f} {units}"
        told = [
            event
            for host, journal in hosts.on_all(list(hosts.HOSTS), read).items()
            for line in journal.splitlines()
            if (event := self._event(host, line))
        ]
        return sorted(_once(sorted(told)))

    def _event(self, host: str, line: str) -> Event | None:
        stamp, _, program, message = (*line.split(" ", 3), "", "", "")[:4]
        for source, name, pattern, says in _TOLD:
            if re.match(rf"{name}\[", program) and (found := re.search(pattern, message)):
                return Event(round(float(stamp) - self._wall, 2), source, host, found.expand(says))
        return None

    def _write(self) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        file = RESULTS / f"{re.sub('[^a-z0-9]+', '-', self.name.lower())}.json"
        file.write_text(json.dumps(self._told(), indent=1) + "\n")
        picture.draw(file, file.with_suffix(".svg"))

    def _told(self) -> dict[str, Any]:
        failures = self.failures()
        return {
            "name": self.name,
            "scheduler": hosts.SCHEDULER,
            "proxies": len(hosts.names("proxies")),
            "sent": len(self.answers),
            "failed": len(failures),
            "failed_methods": dict(Counter(a.method for a in failures)),
            "failed_kinds": dict(Counter(str(a.failure) for a in failures)),
            "failing_s": round(max(a.start for a in failures) - min(a.start for a in failures), 2)
            if failures
            else 0,
            "slowest_s": round(max((a.seconds for a in self.answers), default=0), 2),
            "seconds": _by_second(self.answers),
            "marks": [{"time": round(m.time, 2), "says": m.says} for m in self.marks],
            "events": [e._asdict() for e in self.events],
        }


def _once(events: list[Event]) -> list[Event]:
    """HAProxy says things twice, to syslog and to its standard error; one of them within a second."""
    last: dict[tuple[str, ...], float] = {}
    kept = []
    for event in events:
        if event.time - last.get(event[1:], -9) > 1:
            kept.append(event)
        last[event[1:]] = event.time
    return kept


def _by_second(answers: list[Answer]) -> list[dict[str, Any]]:
    """For each second: requests that were sent in it, and what became of them. The last is cut off."""
    end = int(max((a.start for a in answers), default=0))
    seconds: list[dict[str, Any]] = [
        {"sent": 0, "failed": 0, "slowest_s": 0.0, "versions": Counter()} for _ in range(end)
    ]
    for answer in answers:
        if int(answer.start) < end:
            second = seconds[int(answer.start)]
            second["sent"] += 1
            second["failed"] += answer.failure is not None
            second["slowest_s"] = max(second["slowest_s"], round(answer.seconds, 3))
            if answer.version:
                second["versions"][answer.version] += 1
    return seconds
