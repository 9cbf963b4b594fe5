"""Does exactly one version serve? Consul's entries and HAProxy's statistics, side by side."""

from typing import Any

import pytest

from tasks import serving

# The columns that are read, from GET /;csv of HAProxy 2.6.12.
HEADER = "# pxname,svname,qcur,status,weight\n"


def entry(version: str, port: int, address: str = "10.0.0.1") -> dict[str, Any]:
    service = {"Address": address, "Port": port, "Meta": {"version": version}}
    return {"Node": {"Address": address}, "Service": service}


def stats(*servers: tuple[str, str]) -> str:
    rows = [("http", "FRONTEND", "OPEN"), *(("app", *server) for server in servers), ("app", "BACKEND", "UP")]
    return HEADER + "".join(f"{proxy},{name},0,{status},1\n" for proxy, name, status in rows)


NEW = serving.instances([entry("0.0.3", 21000), entry("0.0.3", 22000)])
A, B = "app-0.0.3-10.0.0.1-21000", "app-0.0.3-10.0.0.1-22000"


def test_exactly_the_new_version() -> None:
    assert serving.consul_fault(NEW, "0.0.3", 2) is None
    assert serving.haproxy_fault(stats((A, "UP"), (B, "UP 1/2")), "app", NEW) is None


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ([entry("0.0.3", 1)], "1 of 2 instances of 0.0.3 pass in Consul"),
        ([entry("0.0.3", 1), entry("0.0.2", 2)], "0.0.2 is still in Consul"),
        (
            [entry("0.0.3", 1), entry("0.0.3", 2), entry("0.0.3", 3)],
            "3 of 2 instances of 0.0.3 pass in Consul",
        ),
        ([], "0 of 2 instances of 0.0.3 pass in Consul"),
    ],
)
def test_what_is_wrong_in_consul(entries: list[dict[str, Any]], fault: str) -> None:
    assert serving.consul_fault(serving.instances(entries), "0.0.3", 2) == fault


def test_without_a_count_one_instance_is_needed() -> None:
    assert serving.consul_fault(NEW, "0.0.3", None) is None
    assert serving.consul_fault(set(), "0.0.3", None) == "0 of its instances of 0.0.3 pass in Consul"


@pytest.mark.parametrize(
    ("servers", "fault"),
    [
        ([(A, "UP")], f"{B} is not in HAProxy"),
        ([(A, "UP"), (B, "UP"), ("app-0.0.2-x", "UP")], "app-0.0.2-x is still in HAProxy"),
        ([(A, "UP"), (B, "DOWN")], f"{B} is DOWN"),
        ([(A, "UP"), (B, "no check")], f"{B} is no check"),
    ],
)
def test_what_is_wrong_in_haproxy(servers: list[tuple[str, str]], fault: str) -> None:
    assert serving.haproxy_fault(stats(*servers), "app", NEW) == fault


def test_an_instance_without_a_version_counts_as_another() -> None:
    anonymous = {"Node": {"Address": "10.0.0.1"}, "Service": {"Address": "", "Port": 1, "Meta": {}}}
    found = serving.instances([anonymous])
    assert found == {("unknown", "10.0.0.1", 1)}
    assert serving.consul_fault(found, "0.0.3", 1) == "unknown is still in Consul"
