"""Two proxies and the address that moves between them: what clients of that address see when one ails.

At most 3 s without an answer and never a wrong one, wherever the address goes; and it does not move
for what heals by itself.
"""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import pytest

from group_data import all as knobs
from tests.lab import hosts
from tests.lab.test_bad_input import refused
from tests.lab.test_rollback import status
from tests.load import Load

PROXIES = hosts.names("proxies")
VIP: str = hosts.HOSTS[PROXIES[0]].get("haproxy_vip", "")
pytestmark = [
    pytest.mark.skipif(not VIP, reason="this lab has one proxy: make up PROXIES=2"),
    pytest.mark.skipif(hosts.SETTINGS.provider != "docker", reason="reaches into Docker's hosts without SSH"),
    pytest.mark.usefixtures("as_found"),
]
MOST_S = 3.0  # without an answer, while the address moves
# A request that was on its way through the lost proxy, or a connection kept there, ends like this.
CUT = {"connection refused", "closed without an answer", "timeout", "answer cut short", "OSError"}


# So long that a keepalived that takes the address because it hears no other one has done it.
_LONG_ACTIVE = """
since=$(date +%s -d "$(systemctl show -P StateChangeTimestamp keepalived)")
[ $(($(date +%s) - since)) -lt 4 ] || systemctl is-active keepalived consul-template
"""


class Gap:
    """Asks for /status on a new connection 20 times a second. seconds: the longest without an answer."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask_on_and_on)

    def __enter__(self) -> Gap:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _ask_on_and_on(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(0.05):
            well = self._ask()
            now = time.monotonic()
            self.seconds = max(self.seconds, now - last)
            last = now if well else last

    def _ask(self) -> bool:
        client = http.client.HTTPConnection(VIP, knobs.haproxy_http_port, timeout=0.3)
        try:
            client.request("GET", "/status")
            return client.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            client.close()


def inside(proxy: str, command: str) -> str:
    """Run it as root without SSH, which may be cut off."""
    ran = ["docker", "exec", container(proxy), "sh", "-c", command]
    return subprocess.run(ran, capture_output=True, text=True).stdout


def container(proxy: str) -> str:
    return (hosts.ROOT / ".vagrant" / "machines" / proxy / "docker" / "id").read_text()


def holders() -> list[str]:
    """The proxies that have the address; one that is off has not."""
    return [proxy for proxy in PROXIES if inside(proxy, f"ip -o -4 addr show to {VIP}/32")]


def settled() -> str:
    """The one that holds it, once both are fit: their HAProxy answers with the same, healthy servers."""

    def fit() -> list[str]:
        backends = [hosts.haproxy_servers(proxy) for proxy in PROXIES]
        same = all(servers == backends[0] and set(servers.values()) == {"UP"} for servers in backends)
        active = [inside(proxy, _LONG_ACTIVE) for proxy in PROXIES]
        well = same and backends[0] and all(lines.split() == ["active"] * 2 for lines in active)
        found = holders()
        return found if well and len(found) == 1 else []

    holder: str = hosts.wait_for("both proxies to be fit, and one to hold the address", fit, 90)[0]
    return holder


def other_than(proxy: str) -> str:
    return next(name for name in PROXIES if name != proxy)


@contextmanager
def under_load(version: str, allowed: set[str]) -> Iterator[Gap]:
    """Load on the address. Every answer is right; requests without one are of the `allowed` kinds."""
    with Gap() as gap, Load(f"http://{VIP}:{knobs.haproxy_http_port}", rate=80, versions=[version]) as load:
        yield gap
    print(f"longest without an answer: {gap.seconds:.2f} s\n{load.result}")
    assert load.result.ok
    assert set(load.result.kinds) <= allowed, load.result
    assert gap.seconds <= MOST_S


def moved_from(holder: str) -> bool:
    return holders() == [other_than(holder)]


FAULTS = {
    "HAProxy stopped": ("systemctl stop haproxy", "systemctl start haproxy"),
    "HAProxy frozen": ("pkill -STOP -x haproxy", "pkill -CONT -x haproxy"),
    "keepalived stopped": ("systemctl stop keepalived", "systemctl start keepalived"),
    "network cut": ("ip link set NIC down", "ip link set NIC up"),
    "shut down": ("shut down", "power on"),
    "power cut": ("power off", "power on"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_address_moves_and_does_not_come_back(fault: str, as_found: str) -> None:
    begin, end = FAULTS[fault]
    holder = settled()
    with under_load(as_found, CUT):
        try:
            do(holder, begin)
            hosts.wait_for("the address to move", lambda: other_than(holder) in holders(), 20)
            hosts.wait_for("answers again", lambda: running_version_at_vip() == as_found, 20)
        finally:
            do(holder, end)
        assert settled() == other_than(holder)


def do(proxy: str, what: str) -> None:
    if what == "power off":
        hosts.power_off(proxy)
    elif what == "shut down":
        subprocess.run(["docker", "stop", container(proxy)], check=True, capture_output=True)
    elif what == "power on":
        hosts.power_on(proxy)
    else:
        inside(proxy, what.replace("NIC", nic(proxy)))


def nic(proxy: str) -> str:
    """The name of the NIC that has its private address."""
    return inside(proxy, "sed s/.*=// /run/keepalived-nic.conf").strip()


def running_version_at_vip() -> str:
    client = http.client.HTTPConnection(VIP, knobs.haproxy_http_port, timeout=2)
    client.request("GET", "/version")
    return client.getresponse().read().decode().strip().removeprefix("Version: ")


def test_proxies_that_do_not_hear_each_other_answer_right(as_found: str) -> None:
    """Both hold the address then; one of them keeps it when they hear each other again."""
    settled()
    peer = {proxy: hosts.HOSTS[other_than(proxy)]["address"] for proxy in PROXIES}
    with under_load(as_found, CUT):
        try:
            for proxy in PROXIES:
                inside(proxy, f"ip neigh replace {peer[proxy]} lladdr 02:00:00:00:00:01 dev {nic(proxy)}")
            hosts.wait_for("both to hold it", lambda: holders() == PROXIES, 20)
            hosts.wait_for("an answer", lambda: running_version_at_vip() == as_found, 10)
        finally:
            for proxy in PROXIES:
                inside(proxy, f"ip neigh del {peer[proxy]} dev {nic(proxy)}")
        settled()


@pytest.mark.parametrize("process", ["keepalived", "haproxy"])
def test_a_process_that_is_killed_comes_back(process: str, as_found: str) -> None:
    """Its workers are killed with it. Whether the address moves meanwhile does not matter."""
    holder = settled()
    with under_load(as_found, CUT):
        inside(holder, f"systemctl kill --signal=KILL {process}")
        settled()


def test_consul_template_that_is_killed_costs_nothing(as_found: str) -> None:
    """It is back before the address would move."""
    holder = settled()
    with under_load(as_found, set()):
        before = inside(holder, "systemctl show -P MainPID consul-template")
        inside(holder, "systemctl kill --signal=KILL consul-template")
        hosts.wait_for(
            "systemd to restart it",
            lambda: inside(holder, "systemctl show -P MainPID consul-template") not in (before, "0\n"),
        )
        assert settled() == holder


def test_the_address_leaves_a_proxy_without_consul_template(as_found: str) -> None:
    """And no request is lost when it is back: nobody takes the address back."""
    holder = settled()
    try:
        with under_load(as_found, CUT):
            inside(holder, "systemctl stop consul-template")
            hosts.wait_for("the address to move", lambda: moved_from(holder), 30)
        with under_load(as_found, set()):
            inside(holder, "systemctl start consul-template")
            assert settled() == other_than(holder)
    finally:
        inside(holder, "systemctl start consul-template")


def test_the_address_stays_when_both_lack_consul_template(as_found: str) -> None:
    holder = settled()
    try:
        with under_load(as_found, set()):
            for proxy in (other_than(holder), holder):
                inside(proxy, "systemctl stop consul-template")
            hosts.wait_for("keepalived to notice", lambda: all(map(misses_consul_template, PROXIES)), 30)
            assert holders() == [holder]
    finally:
        for proxy in PROXIES:
            inside(proxy, "systemctl start consul-template")


def misses_consul_template(proxy: str) -> bool:
    said = inside(
        proxy, "journalctl -b -u keepalived -o cat | grep 'VRRP_Script(consul_template)' | tail -n 1"
    )
    return "failed" in said


def test_a_changed_configuration_costs_nothing(as_found: str) -> None:
    """keepalived is reloaded and the template applied on the holder last; the address stays."""
    holder = settled()
    for arguments in (["--data=haproxy_timeout=61s"], []):
        hosts.on_all(PROXIES, "touch /etc/keepalived/keepalived.conf")  # newer than what keepalived read
        with under_load(as_found, set()):
            run = hosts.pyinfra("deploy.py", "--data=only=haproxy,keepalived", *arguments)
            assert run.code == 0, run.output
        for unit in ("consul-template", "keepalived"):
            order = [line.split("]")[0].lstrip("[") for line in run.lines(f"restarting {unit}")]
            assert order == [other_than(holder), holder], run.output
        assert settled() == holder
    assert hosts.pyinfra("deploy.py").changed == {}


def test_status_tells_who_holds_the_address_and_what_is_wrong(as_found: str) -> None:
    holder = settled()
    found = status()
    assert (found["healthy"], [name for name, p in found["proxies"].items() if p["vip"]["held"]]) == (
        True,
        [holder],
    )
    inside(other_than(holder), "systemctl stop keepalived")
    try:
        assert status()["wrong"] == [f"{other_than(holder)}: keepalived: it does not run; run deploy.py"]
    finally:
        inside(other_than(holder), "systemctl start keepalived")
    settled()


def test_a_replaced_nic_is_found_by_deploy() -> None:
    """It has another name then, by which keepalived does not know it."""
    proxy = other_than(settled())
    network = f"vagrant_network_{hosts.SETTINGS.network}.0/24"
    address = hosts.HOSTS[proxy]["address"]
    subprocess.run(["docker", "network", "disconnect", network, container(proxy)], check=True)
    subprocess.run(["docker", "network", "connect", "--ip", address, network, container(proxy)], check=True)
    run = hosts.pyinfra("deploy.py", "--data=only=keepalived")
    assert run.code == 0, run.output
    assert list(run.changed.values()) in ([], [[proxy]]), run.output
    other = settled()
    if other != proxy:
        inside(other, "systemctl restart keepalived")
        hosts.wait_for("the address to move", lambda: moved_from(other))


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("192.168.0.20", "not a host's address in .*, the network of proxy-0[12]; choose one"),
        (
            hosts.HOSTS[hosts.names("workers")[0]]["address"],
            "the address of worker-01 itself; choose a free one",
        ),
        # Docker's own address on the bridge: the machine that this runs on.
        (f"{hosts.SETTINGS.network}.1", ".*, none of the proxies, answers there; choose a free address"),
    ],
)
def test_an_address_that_cannot_be_had(address: str, line: str) -> None:
    refused(f"haproxy_vip={address}: {line}", "deploy.py", f"--data=haproxy_vip={address}")


def test_a_proxy_that_is_left_alone_says_what_is_left_over() -> None:
    """The inventory has one proxy now. What clients may still use is not taken away."""
    holder = settled()
    script = (hosts.ROOT / "inventory.py").read_text()
    inventory = hosts.ROOT / ".vagrant" / "one_proxy.py"
    inventory.write_text(f"{script}\nproxies = [proxy for proxy in proxies if proxy[0] == {holder!r}]\n")
    try:
        command = [sys.executable, "-m", "pyinfra", "-y", str(inventory), "deploy.py"]
        run = subprocess.run(command, cwd=hosts.ROOT, capture_output=True, text=True)
    finally:
        inventory.unlink()
        hosts.pyinfra("deploy.py", "--data=only=firewall")  # it kept the other proxy out
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("keepalived still runs here and may hold an address that clients use") == 1
    assert holders() == [holder]
