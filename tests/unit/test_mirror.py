"""The artifact mirror against a publisher on the loopback, whose key is made here."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tasks import mirror

TOOL, VERSION, ARCH = "nomad", "9.8.7", "amd64"
ZIP = f"{TOOL}_{VERSION}_linux_{ARCH}.zip"
SUMS = f"{TOOL}_{VERSION}_SHA256SUMS"
PUBLISHER_KEY = mirror.KEY


class Signer:
    """A GnuPG home with one key."""

    def __init__(self, home: str, *options: str) -> None:
        self.base = ["gpg", f"--homedir={home}", "--batch", "--yes", "--quiet", *options]
        self.run("--passphrase=", "--quick-generate-key", "Test", "ed25519", "sign", "1d")
        self.key = Path(home, "key.asc")
        self.run("--armor", f"--output={self.key}", "--export")

    def run(self, *argv: str) -> None:
        subprocess.run([*self.base, *argv], check=True, capture_output=True)

    def sign(self, sums: Path) -> None:
        self.run(f"--output={sums}.sig", "--detach-sign", str(sums))


def signer(*options: str) -> Iterator[Signer]:
    if not shutil.which("gpg") or not shutil.which("gpgv"):
        pytest.skip("gpg and gpgv are not installed: signatures cannot be made")
    home = tempfile.mkdtemp(prefix="gpg")  # not tmp_path: the agent's socket needs a short path
    yield Signer(home, *options)
    subprocess.run(["gpgconf", f"--homedir={home}", "--kill", "all"], check=True)
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def publisher() -> Iterator[Signer]:
    yield from signer()


@pytest.fixture(scope="module")
def stranger() -> Iterator[Signer]:
    yield from signer()


@pytest.fixture(scope="module")
def expired() -> Iterator[Signer]:
    yield from signer("--faked-system-time=20200101T000000")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASHISTACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mirror, "_unreachable", {})
    monkeypatch.setattr(mirror, "PUBLISHER", "http://127.0.0.1:9")  # nothing listens there
    return tmp_path / "cache"


def put(root: Path, content: bytes = b"binary", arch: str = ARCH) -> Path:
    """A release in `root`, unsigned; its folder."""
    folder = root / TOOL / VERSION
    folder.mkdir(parents=True, exist_ok=True)
    zip_ = folder / ZIP.replace(ARCH, arch)
    with zipfile.ZipFile(zip_, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(TOOL, content)
    with (folder / SUMS).open("a") as sums:
        sums.write(f"{hashlib.sha256(zip_.read_bytes()).hexdigest()}  {zip_.name}\n")
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """A site: its URL, its folder, and the paths that were asked for."""
    root = tmp_path / "site"
    root.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as server:
        server.asked = []  # type: ignore[attr-defined]
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", root, server.asked  # type: ignore[attr-defined]
        server.shutdown()


Site = tuple[str, Path, list[str]]


def refused(match: str, source: str = "") -> str:
    """The one line that `fill` refuses with."""
    with pytest.raises(mirror.MirrorError, match=match) as caught:
        mirror.fill(TOOL, VERSION, ARCH, source)
    line = str(caught.value)
    assert "\n" not in line
    return line


def held(cache: Path) -> list[str]:
    """All that is in the cache."""
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


def test_the_publishers_key_is_the_one_that_was_published() -> None:
    if not shutil.which("gpg"):
        pytest.skip("gpg is not installed: the key cannot be read")
    # gpg's agent takes its sockets away by itself, perhaps at the same moment.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        shown = subprocess.run(
            ["gpg", f"--homedir={home}", "--show-keys", "--with-colons", str(PUBLISHER_KEY)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    primary = next(line for line in shown.splitlines() if line.startswith("fpr:"))
    assert primary.split(":")[9] == "C874011F0AB405110D02105534365D9472D7468F"


# The local folder


def test_an_unsigned_zip_in_the_local_folder_is_taken_and_called_so(cache: Path) -> None:
    folder = put(cache)
    artifact = mirror.fill(TOOL, VERSION, ARCH)
    assert (artifact.zip, artifact.signed) == (folder / ZIP, False)
    assert artifact.origin == "local build, unsigned"
    assert artifact.sha256 == hashlib.sha256((folder / ZIP).read_bytes()).hexdigest()


def test_a_wrong_sum_names_the_file_what_was_expected_and_what_was_found(cache: Path) -> None:
    folder = put(cache)
    good = hashlib.sha256((folder / ZIP).read_bytes()).hexdigest()
    with (folder / ZIP).open("ab") as file:
        file.write(b"x")
    bad = hashlib.sha256((folder / ZIP).read_bytes()).hexdigest()
    line = refused("wrong sum")
    assert all(part in line for part in (ZIP, good, bad, "remove it"))


def test_a_zip_without_sums_is_refused(cache: Path) -> None:
    (put(cache) / SUMS).unlink()
    refused(f"no {SUMS} beside it")


def test_a_zip_that_the_sums_do_not_list_is_refused(cache: Path) -> None:
    (put(cache) / SUMS).write_text(f"{'0' * 64}  another.zip\n")
    refused(f"no line for {ZIP}")


def test_a_signature_in_the_local_folder_is_verified(
    cache: Path, publisher: Signer, stranger: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "KEY", publisher.key)
    folder = put(cache)
    publisher.sign(folder / SUMS)
    assert mirror.fill(TOOL, VERSION, ARCH).signed
    stranger.sign(folder / SUMS)
    refused("not the publisher's signature")


def test_sums_that_were_changed_after_signing_are_refused(
    cache: Path, publisher: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "KEY", publisher.key)
    folder = put(cache)
    publisher.sign(folder / SUMS)
    with (folder / SUMS).open("a") as sums:
        sums.write(f"{'0' * 64}  more.zip\n")
    refused("not the publisher's signature")


def test_a_signature_by_an_expired_key_is_refused(
    cache: Path, expired: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "KEY", expired.key)
    expired.sign(put(cache) / SUMS)
    refused("not the publisher's signature")


# A URL


def test_a_signed_release_is_downloaded_once_and_listed_as_ours(
    cache: Path, site: Site, publisher: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "KEY", publisher.key)
    url, root, asked = site
    publisher.sign(put(root) / SUMS)
    artifact = mirror.fill(TOOL, VERSION, ARCH, url)
    assert artifact.signed
    assert artifact.zip.read_bytes() == (root / TOOL / VERSION / ZIP).read_bytes()
    assert len(asked) == 3
    assert mirror.fill(TOOL, VERSION, ARCH, url) == artifact
    assert len(asked) == 3
    ours = (cache / "ours.txt").read_text().splitlines()
    assert sorted([*ours, "ours.txt"]) == held(cache)


def test_an_unsigned_release_from_a_url_is_refused_and_nothing_is_kept(cache: Path, site: Site) -> None:
    url, root, asked = site
    put(root)
    assert "must be signed" in refused("HTTP 404", url)
    assert held(cache) == []
    assert not any(path.endswith(".zip") for path in asked)


def test_a_release_signed_by_somebody_else_is_refused_and_nothing_is_kept(
    cache: Path, site: Site, publisher: Signer, stranger: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "KEY", publisher.key)
    url, root, _ = site
    stranger.sign(put(root) / SUMS)
    refused("not the publisher's signature", url)
    assert held(cache) == []


def test_a_download_with_a_wrong_sum_is_refused_and_nothing_is_kept(
    cache: Path, site: Site, publisher: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "KEY", publisher.key)
    url, root, _ = site
    folder = put(root)
    publisher.sign(folder / SUMS)
    (folder / ZIP).write_bytes(b"something else")
    refused("wrong sum", url)
    assert held(cache) == []


def test_a_release_that_is_not_there_says_what_to_do(site: Site) -> None:
    line = refused("HTTP 404", site[0])
    assert f"{TOOL}/{VERSION}/{SUMS}" in line
    assert "artifact_mirror" in line


def test_a_source_that_is_unreachable_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    refused("Connection refused")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    refused("Connection refused")


def test_a_connection_that_breaks_is_an_error(tmp_path: Path) -> None:
    out = (tmp_path / "out").open("wb")
    with (tmp_path / "in").open("w+b") as answer, out, pytest.raises(EOFError, match="0 of 10 bytes"):
        mirror._copy(answer, out, ZIP, 10)


def test_a_long_download_shows_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mirror, "PROGRESS_S", -1)
    (tmp_path / "in").write_bytes(bytes(2_000_000))
    with (tmp_path / "in").open("rb") as answer, (tmp_path / "out").open("wb") as out:
        mirror._copy(answer, out, ZIP, 2_000_000)
    assert f"{ZIP}: 2 of 2 MB" in capsys.readouterr().err


def test_a_signed_release_replaces_our_own_build_of_another_architecture(
    cache: Path, site: Site, publisher: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "KEY", publisher.key)
    url, root, _ = site
    own = put(cache, arch="arm64")
    for file in own.iterdir():
        mirror.record(file)
    publisher.sign(put(root) / SUMS)
    assert mirror.fill(TOOL, VERSION, ARCH, url).signed
    assert not (own / ZIP.replace(ARCH, "arm64")).exists()


def test_sums_that_somebody_put_there_are_not_replaced(cache: Path, site: Site, publisher: Signer) -> None:
    url, root, _ = site
    theirs = put(cache, arch="arm64")
    before = held(cache)
    publisher.sign(put(root) / SUMS)
    refused("the zip that it lists is missing", url)
    assert held(cache) == before
    assert theirs.exists()


# A folder


def test_a_folder_of_the_users_is_used_where_it_is(cache: Path, tmp_path: Path) -> None:
    folder = put(tmp_path / "theirs")
    artifact = mirror.fill(TOOL, VERSION, ARCH, str(tmp_path / "theirs"))
    assert (artifact.zip, artifact.signed) == (folder / ZIP, False)
    assert held(cache) == []


def test_a_folder_without_the_release_says_so(tmp_path: Path) -> None:
    refused("no such file", str(tmp_path))


# The disk


def test_a_full_disk_is_one_line_and_nothing_is_kept(
    cache: Path, site: Site, publisher: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "KEY", publisher.key)
    url, root, _ = site
    publisher.sign(put(root) / SUMS)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mirror, "_copy", full)
    refused("the disk is full", url)
    assert held(cache) == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HASHISTACK_CACHE", str(tmp_path / "file" / "cache"))
    refused("Not a directory")


# Builds


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes nomad 9.8.7 buildable by a `go` that is the given shell script."""
    folder = tmp_path / "go" / TOOL
    folder.mkdir(parents=True)
    (folder / "go.mod").write_text(f"module x\n\ngo 1.20\n\nrequire example.org/{TOOL} v{VERSION}\n")
    monkeypatch.setattr(mirror, "GO_MODULES", tmp_path / "go")

    def go(script: str) -> None:
        bin_ = tmp_path / "bin"
        bin_.mkdir(exist_ok=True)
        (bin_ / "go").write_text(f"#!/bin/sh\n{script}\n")
        (bin_ / "go").chmod(0o755)
        monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")

    return go


BUILDS = 'for last in "$@"; do case $last in -o=*) echo "$GOARCH" >"${last#-o=}";; esac; done'


def test_what_cannot_be_downloaded_is_built(cache: Path, module: Callable[[str], None]) -> None:
    module(BUILDS)
    artifact = mirror.fill(TOOL, VERSION, ARCH)
    assert not artifact.signed
    with zipfile.ZipFile(artifact.zip) as archive:
        assert archive.namelist() == [TOOL]
        assert archive.read(TOOL) == b"amd64\n"
        assert archive.getinfo(TOOL).compress_type == zipfile.ZIP_DEFLATED
    assert mirror.fill(TOOL, VERSION, ARCH) == artifact
    other = mirror.fill(TOOL, VERSION, "arm64")
    assert mirror.fill(TOOL, VERSION, ARCH) == artifact, "the second build spoilt the first one's sum"
    assert other.sha256 != artifact.sha256
    ours = (cache / "ours.txt").read_text().splitlines()
    assert sorted([*ours, "ours.txt"]) == held(cache)


def test_another_version_is_not_built_instead(module: Callable[[str], None]) -> None:
    module(BUILDS)
    with pytest.raises(mirror.MirrorError, match=f"set nomad_version to {VERSION}"):
        mirror.fill(TOOL, "9.9.9", ARCH)
    assert mirror.fill_or_fall_back(TOOL, "9.9.9", ARCH).version == VERSION


def test_a_wrong_artifact_is_no_reason_to_build(cache: Path, module: Callable[[str], None]) -> None:
    module(BUILDS)
    (put(cache) / ZIP).write_bytes(b"something else")
    refused("wrong sum")
    with pytest.raises(mirror.MirrorError, match="wrong sum"):
        mirror.fill_or_fall_back(TOOL, VERSION, ARCH)


def test_an_unsigned_mirror_is_no_reason_to_build(site: Site, module: Callable[[str], None]) -> None:
    module(BUILDS)
    url, root, _ = site
    put(root)
    refused("must be signed", url)


def test_a_build_that_fails_gives_its_last_line(cache: Path, module: Callable[[str], None]) -> None:
    module("echo first >&2; echo 'undefined: x' >&2; exit 1")
    refused("does not build: undefined: x")
    assert held(cache) == []


def test_without_go_a_build_says_what_to_install(
    module: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    refused("there is no `go`")


def test_a_build_does_not_break_sums_that_are_signed(
    cache: Path, module: Callable[[str], None], publisher: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "KEY", publisher.key)
    module(BUILDS)
    publisher.sign(put(cache, arch="arm64") / SUMS)
    refused("signed by the publisher")


@pytest.mark.parametrize(("tool", "version"), [("consul", "1.14.11"), ("consul-template", "0.43.0")])
def test_what_can_be_built(tool: str, version: str) -> None:
    assert mirror.buildable(tool) == version
    assert f"github.com/hashicorp/{tool} v{version} h1:" in (mirror.GO_MODULES / tool / "go.sum").read_text()


def test_nomad_cannot_be_built() -> None:
    assert mirror.buildable("nomad") is None


# The command line


def test_the_command_line_fails_with_the_line_alone(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tasks.mirror", TOOL, VERSION, ARCH, str(tmp_path)],
        cwd=mirror.GO_MODULES.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    assert "no such file" in ran.stderr
