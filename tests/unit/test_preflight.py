"""Bad input: one line that says what to do, exit code not 0, and nothing changed."""

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.conftest import ROOT, Run

Pyinfra = Callable[..., Run]
# So that no artifact is looked for: the hosts of world.py have these.
VERSIONS = [
    argument
    for tool in ("consul", "nomad", "consul_template")
    for argument in ("--data", f"{tool}_version=1.0.0")
]


def refusal(run: Run) -> str:
    """pyinfra prints our line behind an arrow and the place in the code, as the last thing it says."""
    assert run.code == 1
    assert "Beginning operation run" not in run.stderr
    assert "Traceback" not in run.stderr
    assert run.results == {}
    last = re.sub(r"\x1b\[[0-9;]*m", "", run.stderr).splitlines()[-1]
    return re.sub(r"^--> pyinfra error in \S+ line \d+: ", "", last)


def test_good_input_passes(pyinfra: Pyinfra) -> None:
    """On a new host, where nothing runs the app yet."""
    run = pyinfra("check.py", *VERSIONS, state={})
    assert (run.code, len(run.changed()["Go on"])) == (0, 4)
    assert "untested" not in run.stderr
    assert "servers" not in run.stderr


def test_a_secured_host_is_not_opened(pyinfra: Pyinfra) -> None:
    found = {"/etc/hashistack/ca.pem": ["/etc/hashistack/ca.pem 644 root:root 1234"]}
    run = pyinfra("check.py", *VERSIONS, "--data", "secure=false", state={}, answers={"worker-02": found})
    assert refusal(run).startswith("@fake/worker-02: is secured, secure=False would cut it off")


def test_an_open_host_is_not_secured_in_place(pyinfra: Pyinfra) -> None:
    found = {"-q consul && ! test -e": ["open"]}
    run = pyinfra("check.py", *VERSIONS, state={}, answers={"worker-02": found})
    assert refusal(run).startswith("@fake/worker-02: Consul runs without encryption, secure=True would cut")


def test_what_was_never_secured_may_stay_so(pyinfra: Pyinfra) -> None:
    run = pyinfra("check.py", *VERSIONS, "--data", "secure=false", state={})
    assert run.code == 0, run.stderr


def test_an_unknown_role_lists_the_roles(pyinfra: Pyinfra) -> None:
    run = pyinfra(ROOT / "deploy.py", "--data", "only=haproxy,dsn,x", state={})
    roles = "base, firewall, consul, docker, dns, nomad, registry, haproxy, keepalived"
    assert refusal(run).startswith(f"only=haproxy,dsn,x: no role dsn, x; roles: {roles}")


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_hosts_that_are_down_are_named_with_the_way_round_them(
    pyinfra: Pyinfra, closed_port: int, tmp_path: Path
) -> None:
    ssh = {
        "ssh_hostname": "127.0.0.1",
        "ssh_port": closed_port,
        "ssh_known_hosts_file": str(tmp_path / "known"),
    }
    down = [("proxy-03", ssh), ("proxy-02", ssh)]
    run = pyinfra(ROOT / "deploy.py", state={}, unreachable=down)
    assert refusal(run) == (
        "proxy-02, proxy-03: not reached over SSH; repair it,"
        " or go on without: --exclude proxy-02 --exclude proxy-03"
    )
    without = pyinfra("check.py", *VERSIONS, "--exclude", "proxy-02", "--exclude", "proxy-03")
    assert (without.code, len(without.changed()["Go on"])) == (0, 4)


def distribution(name: str, identity: str, version: str) -> dict[str, list[str]]:
    lines = [
        "/etc/os-release",
        f"ID={identity}",
        f'VERSION_ID="{version}"',
        f'PRETTY_NAME="{name} {version}"',
        "---",
    ]
    return {"-release": lines}


@pytest.mark.parametrize(
    ("name", "identity", "version"), [("Ubuntu", "ubuntu", "24.04"), ("Debian", "debian", "11")]
)
def test_an_unsupported_system_is_refused(pyinfra: Pyinfra, name: str, identity: str, version: str) -> None:
    answers = {"worker-02": distribution(name, identity, version)}
    line = refusal(pyinfra("check.py", *VERSIONS, state={}, answers=answers))
    assert re.fullmatch(rf"@fake/worker-02: runs {name}.*; use Debian 12 \(13 is untested\)", line)


def test_an_address_that_no_nic_has_is_refused(pyinfra: Pyinfra) -> None:
    answers = {"worker-02": {"ip -o -4 addr": ["172.17.0.4/16", "10.0.0.4/24"]}}
    line = refusal(pyinfra("check.py", *VERSIONS, state={}, answers=answers))
    assert line == (
        "@fake/worker-02: 192.168.56.12 is on none of its NICs, which have 172.17.0.4/16, 10.0.0.4/24;"
        " correct `address` in inventory.py, or attach the NIC"
    )


def test_debian_13_is_called_untested(pyinfra: Pyinfra) -> None:
    run = pyinfra(
        "check.py", *VERSIONS, state={}, answers={"worker-02": distribution("Debian", "debian", "13")}
    )
    assert run.code == 0
    assert run.stderr.count("Debian 13 is untested") == 1


@pytest.mark.parametrize(
    ("servers", "why"),
    [(1, "a quorum needs more"), (2, "no majority survives a split"), (4, "no majority survives a split")],
)
def test_a_number_of_servers_that_gains_nothing_is_called_so(
    pyinfra: Pyinfra, servers: int, why: str
) -> None:
    run = pyinfra("check.py", *VERSIONS, state={}, workers=5, servers=servers)
    assert run.code == 0
    assert f"{servers} servers: {why}; use 3 or 5" in run.stderr


@pytest.mark.parametrize("servers", [3, 5])
def test_three_or_five_servers_are_fine(pyinfra: Pyinfra, servers: int) -> None:
    assert "use 3 or 5" not in pyinfra("check.py", *VERSIONS, state={}, workers=5, servers=servers).stderr


def test_the_scheduler_of_a_host_that_runs_the_app_is_not_changed(pyinfra: Pyinfra) -> None:
    answers = {"worker-02": {"is-active -q nomad": ["nomad"]}}
    arguments = [*VERSIONS, "--data", "scheduler=docker"]
    assert refusal(pyinfra("check.py", *arguments, state={}, answers=answers)).startswith(
        "@fake/worker-02: nomad runs its app, scheduler=docker would cut it off; set scheduler=nomad"
    )


def test_an_older_version_than_what_runs_is_refused(pyinfra: Pyinfra) -> None:
    found = {"for tool in": ["consul present 1.22.3", "consul installed /usr/local/lib/consul/1.22.3/consul"]}
    line = refusal(pyinfra("check.py", *VERSIONS, state={}, answers={"worker-02": found}))
    assert line.startswith("@fake/worker-02: consul 1.22.3 is newer than 1.0.0")
