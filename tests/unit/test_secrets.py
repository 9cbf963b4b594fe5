"""The controller's folder of secrets: made once, private, and never made anew in silence."""

import base64
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks import secrets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    secrets.make(tmp_path / "secrets")
    return tmp_path / "secrets"


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_all_are_made(folder: Path) -> None:
    assert {*secrets.WANTED, secrets.MADE} <= contents(folder).keys()


def test_only_their_owner_can_read_them(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}


def test_a_folder_that_others_could_read_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    secrets.make(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_a_second_time_changes_nothing(folder: Path) -> None:
    before = contents(folder)
    secrets.make(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["gossip-consul", "token-consul-bootstrap", "password-registry"])
def test_a_lost_one_is_an_error_that_names_it(folder: Path, name: str) -> None:
    (folder / name).unlink()
    for ask in (lambda: secrets.make(folder), lambda: secrets.read(folder, name)):
        with pytest.raises(secrets.Missing, match=f"{name} is missing: restore it from your backup"):
            ask()
    assert not (folder / name).exists()


def test_without_the_folder_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(secrets.Missing, match=r"nowhere is missing: run deploy\.py"):
        secrets.token(tmp_path / "nowhere", "consul-status")


def test_one_that_was_brought_is_kept(tmp_path: Path) -> None:
    secrets.write(tmp_path, "gossip-consul", "mine")
    secrets.make(tmp_path)
    assert secrets.gossip_key(tmp_path, "consul") == "mine"


def test_an_interrupted_run_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        secrets.make_once(tmp_path, {"first": lambda: "1", "second": interrupt})
    secrets.make_once(tmp_path, {"first": lambda: "anew", "second": lambda: "2"})
    assert [secrets.read(tmp_path, name) for name in ("first", "second")] == ["1", "2"]


def test_a_new_kind_is_added(folder: Path) -> None:
    before = contents(folder)
    secrets.make_once(folder, {"later": lambda: "x"})
    assert secrets.read(folder, "later") == "x"
    assert contents(folder).items() >= {name: before[name] for name in secrets.WANTED}.items()
    (folder / "later").unlink()
    with pytest.raises(secrets.Missing):
        secrets.make(folder)


def test_two_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: secrets.make(tmp_path), range(8)))
    before = contents(tmp_path)
    assert sorted(secrets.made(tmp_path)) == sorted(secrets.WANTED)
    secrets.make(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("tool", ["consul", "nomad"])
def test_a_gossip_key_has_32_bytes(folder: Path, tool: str) -> None:
    assert len(base64.b64decode(secrets.gossip_key(folder, tool), validate=True)) == 32


def test_tokens_are_different_uuids(folder: Path) -> None:
    tokens = {secrets.read(folder, name) for name in secrets.WANTED if name.startswith("token-")}
    assert {str(uuid.UUID(token)) for token in tokens} == tokens
    assert len(tokens) == sum(name.startswith("token-") for name in secrets.WANTED)


def test_each_agent_has_a_token_of_its_own_that_stays(folder: Path) -> None:
    token = secrets.agent_token(folder, "worker-01")
    assert str(uuid.UUID(token)) == token == secrets.agent_token(folder, "worker-01")
    assert token != secrets.agent_token(folder, "worker-02")
