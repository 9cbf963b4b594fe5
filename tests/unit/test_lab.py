"""The lab's choices: remembered, never shrinking, one line for what cannot be."""

import socket
from pathlib import Path
from typing import Any

import pytest

from lab import down, hosts, settings, up
from lab.hosts import Container
from lab.settings import LabError, Settings
from tasks import mirror


def choose(asked: dict[str, str], known: Settings | None = None, hosts_exist: bool = True) -> Settings:
    return settings.choose(known or Settings(), asked, hosts_exist)


def test_choices_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "FILE", tmp_path / "lab.json")
    assert settings.load() == Settings()
    asked = {"WORKERS": "5", "PROXIES": "2", "NETWORK": "192.168.57", "SCHEDULER": "docker"}
    choose(asked, hosts_exist=False).save()
    known = Settings(workers=5, proxies=2, network="192.168.57", data={"scheduler": "docker"})
    assert choose({}, settings.load()) == known


def test_a_lab_grows() -> None:
    assert choose({"WORKERS": "4"}, Settings(workers=3)).workers == 4


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"WORKERS": "3"}, "WORKERS=3: the lab has 4 and is never shrunk; `make down` first"),
        ({"PROXIES": "1"}, "PROXIES=1: the lab has 2 and is never shrunk; `make down` first"),
        ({"PROVIDER": "libvirt"}, "PROVIDER=libvirt: the hosts were made with docker; `make down` first"),
        ({"HTTP_PORT": "81"}, "HTTP_PORT=81: the hosts were made with 8080; `make down` first"),
        (
            {"NETWORK": "192.168.57"},
            "NETWORK=192.168.57: the hosts were made with 192.168.56; `make down` first",
        ),
        ({"SCHEDULER": "docker"}, "SCHEDULER=docker: the hosts run nomad; `make down` first"),
        ({"WORKERS": "two"}, "WORKERS=two: choose a number from 3 to 10"),
        ({"WORKERS": "2"}, "WORKERS=2: choose a number from 3 to 10"),
        ({"HTTP_PORT": "70000"}, "HTTP_PORT=70000: choose a number from 1 to 65535"),
        ({"PROVIDER": "podman"}, "PROVIDER=podman: choose docker or virtualbox or libvirt"),
        (
            {"NETWORK": "10.0.0"},
            "NETWORK=10.0.0: choose 192.168.56 or 192.168.57 or 192.168.58 or 192.168.59 or 192.168.60 "
            "or 192.168.61 or 192.168.62 or 192.168.63",
        ),
        ({"SCHEDULER": "swarm"}, "SCHEDULER=swarm: choose nomad or docker"),
    ],
)
def test_what_the_hosts_cannot_become_is_refused(asked: dict[str, str], line: str) -> None:
    known = Settings(workers=4, proxies=2, data={"scheduler": "nomad"})
    with pytest.raises(LabError) as error:
        choose(asked, known)
    assert str(error.value) == line


def test_without_hosts_everything_is_open_again() -> None:
    known = Settings(workers=5, data={"scheduler": "docker", "consul_version": "1.14.11", "app_count": 4})
    new = choose({"WORKERS": "3", "PROVIDER": "libvirt"}, known, hosts_exist=False)
    assert new == Settings(provider="libvirt", data={"app_count": 4})


def test_a_busy_port_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "hold_port", lambda provider, port: False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LabError, match=f"port {port} on localhost is in use"):
            up.check(Settings(http_port=port))


def test_our_own_proxy_may_hold_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "hold_port", lambda provider, port: True)
    monkeypatch.setattr(up, "port_is_free", lambda port: False)
    monkeypatch.setattr(up.controller, "missing_packages", list)
    up.check(Settings())


def test_elsewhere_than_on_debian_what_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "port_is_free", lambda port: True)
    monkeypatch.setattr(up.controller, "missing_packages", lambda: ["vagrant", "gpg"])
    monkeypatch.setattr(up.controller, "can_install", lambda: False)
    with pytest.raises(LabError, match="lacks vagrant, gpg: install them"):
        up.check(Settings())


def container(folder: Path, running: bool, id_: str = "a", network: str = "192.168.56") -> Container:
    networks = ("bridge", hosts.network_name(network))
    return Container(id=id_, name=f"lab_{id_}", folder=str(folder), running=running, networks=networks)


def test_only_what_no_folder_answers_for_is_left_over(tmp_path: Path) -> None:
    ours = container(settings.ROOT, True, "ours")
    orphan = container(settings.ROOT, True, "orphan")
    deleted = container(tmp_path / "gone", True, "deleted")
    stopped = container(tmp_path, False, "stopped")
    assert hosts.leftovers([ours, orphan, deleted, stopped], {"ours"}, "192.168.56") == [orphan, deleted]


def test_a_machine_without_a_key_of_its_own_is_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "VAGRANT", tmp_path)
    for name in ("worker-01", "worker-02"):
        folder = tmp_path / "machines" / name / "docker"
        folder.mkdir(parents=True)
        (folder / "id").write_text(f"id of {name}")
    (tmp_path / "machines" / "worker-01" / "docker" / "private_key").touch()
    assert hosts.machines(finished=True) == {"worker-01": "id of worker-01"}
    assert hosts.machines(finished=False) == {"worker-02": "id of worker-02"}


def test_a_host_that_never_got_its_private_nic_is_made_afresh() -> None:
    half_made = container(settings.ROOT, True, "ours", network="192.168.57")
    assert hosts.leftovers([half_made], {"ours"}, "192.168.56") == [half_made]


def test_a_running_lab_of_another_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=f"`make -C {tmp_path} down` first"):
        hosts.leftovers([container(tmp_path, True)], set(), "192.168.56")


def test_another_lab_at_other_addresses_is_not_in_the_way(tmp_path: Path) -> None:
    assert hosts.leftovers([container(tmp_path, True)], set(), "192.168.57") == []


def test_a_network_goes_with_its_last_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    monkeypatch.setattr(hosts, "containers", lambda: [container(tmp_path, False)])
    monkeypatch.setattr(hosts, "succeeds", lambda *_: True)
    monkeypatch.setattr(hosts, "quietly", lambda *argv: removed.append(argv[-1]))
    hosts.remove_network("192.168.56")
    hosts.remove_network("192.168.57")
    assert removed == ["vagrant_network_192.168.57.0/24"]


def test_no_address_beyond_the_gateway_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert not hosts.answers("203.0.113.1")  # an address for documentation


def test_a_listener_next_door_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert hosts.answers("127.0.0.1", port)
    assert not hosts.answers("127.0.0.1", port)


def test_a_new_host_is_not_known_by_its_predecessors_key(tmp_path: Path) -> None:
    file = tmp_path / "lab" / "known_hosts"
    hosts.forget_host_keys(file, {"192.168.56.11"})
    assert file.read_text() == ""
    file.write_text("192.168.56.11 ssh-ed25519 A\n192.168.56.110 ssh-ed25519 B\n")
    hosts.forget_host_keys(file, {"192.168.56.11"})
    assert file.read_text() == "192.168.56.110 ssh-ed25519 B\n"


def without_nomad(*_: Any) -> mirror.Artifact:  # noqa: ANN401
    raise mirror.Unavailable("no way out")


def test_the_scheduler_is_never_chosen_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "fill", without_nomad)
    knobs = {"scheduler": "nomad", "nomad_version": "2.0.5", "artifact_mirror": ""}
    assert up.choose_scheduler(knobs, "") == ("docker", "Nomad cannot be had: no way out")
    assert up.choose_scheduler(knobs, "docker") == ("docker", "as chosen")
    with pytest.raises(mirror.Unavailable):
        up.choose_scheduler(knobs, "nomad")


def test_clean_leaves_a_users_files(tmp_path: Path) -> None:
    (tmp_path / "nomad" / "2.0.5").mkdir(parents=True)
    (tmp_path / "consul" / "1.14.11").mkdir(parents=True)
    theirs = tmp_path / "nomad" / "2.0.5" / "theirs.zip"
    built = tmp_path / "consul" / "1.14.11" / "built.zip"
    theirs.touch()
    built.touch()
    (tmp_path / "ours.txt").write_text("consul/1.14.11/built.zip\n")
    down.empty_cache(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]
    assert not (tmp_path / "consul").exists()


def test_clean_knows_an_empty_cache(tmp_path: Path) -> None:
    down.empty_cache(tmp_path / "never-made")
