"""keepalived's configuration and scripts, and what is refused about the address that the proxies share."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from pyinfra.api.util import get_template

import group_data.all
from tasks import keepalived, vip
from tests.unit.conftest import ROOT, Run
from tests.unit.test_preflight import VERSIONS, refusal

Pyinfra = Callable[..., Run]
SCRIPTS = ROOT / "templates" / "keepalived"
needs_keepalived = pytest.mark.skipif(not shutil.which("keepalived"), reason="keepalived is not installed")


def render(**values: object) -> str:
    """The first of two proxies' configuration; `values` override group_data/all.py."""
    knobs = {**vars(group_data.all), "address": "192.0.2.21", "haproxy_vip": "192.0.2.20", **values}
    template = get_template("templates/keepalived/keepalived.conf.j2", {"trim_blocks": True})
    return template.render(
        host=SimpleNamespace(name="proxy-01", data=SimpleNamespace(**knobs)), peers=["192.0.2.22"]
    )


def complaints(folder: Path, text: str) -> str:
    """What keepalived finds wrong with it, asked as on a proxy. Any NIC will do but loopback."""
    nics = [nic.name for nic in Path("/sys/class/net").iterdir() if nic.name != "lo"]
    if not nics:
        pytest.skip("no NIC here but loopback, which keepalived does not take")
    (folder / "nic.conf").write_text(f"$NIC={nics[0]}\n")
    text = text.replace("/run/keepalived-nic.conf", str(folder / "nic.conf"))
    # What only a proxy has: the user and the scripts.
    text = text.replace("keepalived_script", "nobody").replace(keepalived.SCRIPTS, str(SCRIPTS))
    (folder / "keepalived.conf").write_text(text)
    check = keepalived.CHECK.replace(keepalived.CONFIG, str(folder / "keepalived.conf"))
    ran = subprocess.run(["bash", "-c", check], capture_output=True, text=True, timeout=20)
    assert (ran.returncode == 0) == (ran.stderr == "")
    return ran.stderr


@needs_keepalived
def test_keepalived_has_nothing_to_complain_about(tmp_path: Path) -> None:
    assert complaints(tmp_path, render()) == ""


@needs_keepalived
@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("advert_int 0.5", "advert_intt 0.5", "advert_intt"),
        ("virtual_router_id 56", "virtual_router_id 256", "256"),
        ("$NIC=", "$OTHER=", "$NIC"),
    ],
)
def test_what_is_wrong_is_seen_before_the_reload(
    tmp_path: Path, right: str, wrong: str, complaint: str
) -> None:
    text = render()
    if right in text:
        assert complaint in complaints(tmp_path, text.replace(right, wrong))
    else:
        assert complaint in complaints(tmp_path, text.replace("include", "#"))


def test_only_the_other_proxies_are_peers() -> None:
    text = render()
    assert "unicast_src_ip 192.0.2.21" in text
    assert text.split("unicast_peer {")[1].split("}")[0].split() == ["192.0.2.22"]


def test_the_holder_is_left_alone() -> None:
    """Equal priorities, and an ailing holder can lose the address."""
    text = render()
    assert "nopreempt" not in text
    assert "state BACKUP" in text


class Answer(BaseHTTPRequestHandler):
    status: int

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def statistics(status: int) -> Iterator[int]:
    handler = type("Statistics", (Answer,), {"status": status})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def answers(port: int) -> bool:
    script = ["bash", str(SCRIPTS / "haproxy-answers"), str(port)]
    try:
        return subprocess.run(script, stderr=subprocess.DEVNULL, timeout=1).returncode == 0
    except subprocess.TimeoutExpired:
        return False  # keepalived's timeout


@pytest.mark.parametrize(("status", "well"), [(200, True), (503, False)])
def test_haproxy_is_well_when_its_statistics_answer(status: int, well: bool) -> None:
    with statistics(status) as port:
        assert answers(port) == well
    assert not answers(port)


def find_nic(address: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", SCRIPTS / "find-nic", address], capture_output=True, text=True)


@pytest.mark.skipif(not shutil.which("ip"), reason="no iproute2 here")
def test_the_nic_is_found_by_its_address() -> None:
    assert find_nic("127.0.0.1").stdout == "$NIC=lo\n"


@pytest.mark.skipif(not shutil.which("ip"), reason="no iproute2 here")
def test_an_address_without_a_nic_is_an_error() -> None:
    result = find_nic("192.0.2.99")
    assert (result.returncode, result.stderr) == (1, "192.0.2.99 is on no NIC\n")


# -- what is refused


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("192.168.56.", "not an IPv4 address; choose a free one in the proxies' network"),
        (
            "192.168.57.20",
            "not a host's address in 192.168.56.0/24, the network of @fake/proxy-01; choose one",
        ),
        (
            "192.168.56.255",
            "not a host's address in 192.168.56.0/24, the network of @fake/proxy-01; choose one",
        ),
        ("192.168.56.12", "the address of @fake/worker-02 itself; choose a free one"),
    ],
)
def test_an_address_that_cannot_be_shared(pyinfra: Pyinfra, address: str, line: str) -> None:
    found = {"/32 | awk": ["192.168.56.21/24"]}
    answers = {"proxy-01": found, "proxy-02": found}
    run = pyinfra("check.py", *VERSIONS, "--limit", "@fake/proxy-01", state={}, vip=address, answers=answers)
    assert refusal(run) == f"haproxy_vip={address}: {line}"


NETWORKS = {f"proxy-{n:02d}": {"/32 | awk": [f"192.168.56.{20 + n}/24"]} for n in (1, 2)}


@pytest.mark.parametrize("who", ["", "192.168.56.21", "192.168.56.22"])
def test_a_free_address_or_our_own_is_fine(pyinfra: Pyinfra, who: str) -> None:
    world = {"vip": "192.168.56.20", "answers at the vip": who, "answers": NETWORKS}
    run = pyinfra("check.py", *VERSIONS, state={}, **world)
    assert (run.code, len(run.changed()["Go on"])) == (0, 5)


def test_an_address_that_another_machine_has(pyinfra: Pyinfra) -> None:
    world = {"vip": "192.168.56.20", "answers at the vip": "02:42:c0:a8:38:14", "answers": NETWORKS}
    assert refusal(pyinfra("check.py", *VERSIONS, state={}, **world)) == (
        "haproxy_vip=192.168.56.20: 02:42:c0:a8:38:14, none of the proxies, answers there;"
        " choose a free address"
    )


@pytest.mark.parametrize("number", ["0", "256", "x"])
def test_a_router_id_that_vrrp_has_not(pyinfra: Pyinfra, number: str) -> None:
    argument = ("--data", f"keepalived_router_id={number}")
    run = pyinfra("check.py", *VERSIONS, *argument, state={}, vip="192.168.56.20", answers=NETWORKS)
    assert refusal(run) == f"keepalived_router_id={number}: choose a number from 1 to 255"


def test_the_question_who_holds_it_is_valid_shell() -> None:
    command = vip.Holder().command("192.0.2.20", "192.0.2.21", ["192.0.2.22"])
    subprocess.run(["sh", "-n", "-c", command], check=True)
    subprocess.run(["bash", "-n", "-c", command.removeprefix("bash -c '").removesuffix("'")], check=True)
