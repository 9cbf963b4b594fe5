"""inventory.py for each shape of the lab: run on its own, in a copy, since it reads .lab.json beside it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any

import pytest

from tests.unit.conftest import ROOT

Groups = dict[str, dict[str, dict[str, Any]]]
PRINT = (
    "import json, inventory as i;"
    "print(json.dumps({g: dict(getattr(i, g)) for g in ('workers', 'servers', 'builder', 'proxies')}))"
)


@pytest.fixture
def groups(tmp_path: Path) -> Callable[..., Groups]:
    """Group -> host name -> data, with these settings remembered."""
    (tmp_path / "lab").mkdir()
    shutil.copy(ROOT / "inventory.py", tmp_path)
    shutil.copy(ROOT / "lab" / "settings.py", tmp_path / "lab")

    def read(**settings: object) -> Groups:
        if settings:
            (tmp_path / ".lab.json").write_text(json.dumps(settings))
        command = [sys.executable, "-c", PRINT]
        printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        found: Groups = json.loads(printed)
        return found

    return read


def test_a_lab_has_three_workers_and_a_proxy(groups: Callable[..., Groups]) -> None:
    lab = groups()
    assert {name: list(hosts) for name, hosts in lab.items()} == {
        "workers": ["worker-01", "worker-02", "worker-03"],
        "servers": ["worker-01", "worker-02", "worker-03"],
        "builder": ["worker-03"],
        "proxies": ["proxy-01"],
    }
    addresses = [data["address"] for data in (lab["workers"] | lab["proxies"]).values()]
    assert addresses == ["192.168.56.11", "192.168.56.12", "192.168.56.13", "192.168.56.21"]


@pytest.mark.parametrize(("workers", "servers"), [(3, 3), (4, 3), (5, 5), (6, 5), (10, 5)])
def test_the_number_of_servers_is_odd_and_no_worker_is_left_out(
    groups: Callable[..., Groups], workers: int, servers: int
) -> None:
    lab = groups(workers=workers)
    assert (len(lab["workers"]), len(lab["servers"])) == (workers, servers)
    assert lab["servers"].items() <= lab["workers"].items()


def test_addresses_are_unique_and_in_the_range_that_virtualbox_allows(groups: Callable[..., Groups]) -> None:
    lab = groups(workers=10, proxies=2)
    addresses = [data["address"] for data in (lab["workers"] | lab["proxies"]).values()]
    assert len(set(addresses)) == 12
    assert all(address.startswith("192.168.56.") for address in addresses)


def test_hosts_are_reached_at_their_private_address(groups: Callable[..., Groups]) -> None:
    host = groups(provider="libvirt")["workers"]["worker-02"]
    assert (host["ssh_hostname"], host["ssh_user"]) == ("192.168.56.12", "vagrant")
    assert host["ssh_key"].endswith("/.vagrant/machines/worker-02/libvirt/private_key")
    assert host["ssh_known_hosts_file"].endswith("/.vagrant/known_hosts")


def test_vagrants_way_in_wins_where_it_was_written(groups: Callable[..., Groups], tmp_path: Path) -> None:
    (tmp_path / ".vagrant").mkdir()
    (tmp_path / ".vagrant" / "ssh-config").write_text("")
    host = groups()["workers"]["worker-02"]
    assert host["ssh_config_file"] == str(tmp_path / ".vagrant" / "ssh-config")
    assert "ssh_hostname" not in host


def test_what_make_up_chose_reaches_every_host(groups: Callable[..., Groups]) -> None:
    lab = groups(data={"scheduler": "docker", "consul_version": "1.14.11"})
    for hosts in lab.values():
        assert {(h["scheduler"], h["consul_version"]) for h in hosts.values()} == {("docker", "1.14.11")}


def test_the_vagrantfile_gets_every_address(tmp_path: Path, groups: Callable[..., Groups]) -> None:
    groups()
    command = [sys.executable, "inventory.py"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed)["proxy-01"] == "192.168.56.21"


def test_no_address_clashes_with_docker_s_own(groups: Callable[..., Groups]) -> None:
    """The bridges inside the hosts must not overlap the network between them."""
    knobs: dict[str, Any] = {}
    exec((ROOT / "group_data" / "all.py").read_text(), knobs)
    bridges = [ip_interface(knobs[name]).network for name in ("docker_bip", "docker_address_pool")]
    addresses = [ip_address(host["address"]) for host in groups(workers=10)["workers"].values()]
    assert not any(address in bridge for bridge in bridges for address in addresses)
    assert not bridges[0].overlaps(bridges[1])
