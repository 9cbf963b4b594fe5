"""The build context: the same folder gives the same bytes; what is not part of it changes nothing."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from lab import images
from tasks import image


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An app without Python; the cache is empty and nothing can be downloaded."""
    monkeypatch.setenv("HASHISTACK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "app"
    (folder / "static").mkdir(parents=True)
    (folder / "Dockerfile").write_text("FROM scratch\n")
    (folder / "static" / "page.html").write_text("hello")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "link").symlink_to("run.sh")
    return folder


def members(context: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(context)) as tar:
        return {member.name: member for member in tar.getmembers()}


def test_the_context_holds_the_folder_and_no_times_or_owners(folder: Path) -> None:
    found = members(image.build_context(folder, "amd64"))
    assert list(found) == ["Dockerfile", "link", "run.sh", "static/page.html"]
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in found.values()} == {(0, 0, 0, "")}
    assert found["run.sh"].mode == 0o755
    assert found["link"].linkname == "run.sh"


def test_what_is_not_part_of_the_app_changes_nothing(folder: Path) -> None:
    before = image.source_hash(folder), image.build_context(folder, "amd64")
    for name in ("tests/test_x.py", "static/__pycache__/x.pyc", ".git/HEAD", "old.pyc"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (folder / "Dockerfile").chmod(0o600)  # another umask
    assert (image.source_hash(folder), image.build_context(folder, "amd64")) == before


def test_contents_names_modes_and_links_change_the_hash(folder: Path) -> None:
    hashes = [image.source_hash(folder)]
    (folder / "static" / "page.html").write_text("hallo")
    hashes.append(image.source_hash(folder))
    (folder / "static" / "page.html").rename(folder / "static" / "other.html")
    hashes.append(image.source_hash(folder))
    (folder / "Dockerfile").chmod(0o755)
    hashes.append(image.source_hash(folder))
    (folder / "link").unlink()
    (folder / "link").symlink_to("Dockerfile")
    hashes.append(image.source_hash(folder))
    assert len(set(hashes)) == len(hashes)


def test_a_folder_without_a_dockerfile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(image.ImageError, match="no Dockerfile"):
        image.build_context(tmp_path, "amd64")


def fake_pip(monkeypatch: pytest.MonkeyPatch, returncode: int) -> list[list[str]]:
    """Record pip's command lines; leave two wheels, or fail."""
    calls: list[list[str]] = []

    def run(argv: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(argv)
        dest = Path(next(arg for arg in argv if arg.startswith("--dest="))[7:])
        if returncode == 0:
            (dest / "pip-26.3-py3-none-any.whl").write_text("pip")
            (dest / "flask-3-py3-none-any.whl").write_text("flask")
        return subprocess.CompletedProcess(argv, returncode, "", "noise\nERROR: no such wheel\n")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_wheels_are_downloaded_once_for_each_architecture(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_pip(monkeypatch, 0)
    (folder / "requirements.txt").write_text("flask==3 --hash=sha256:00\n")
    first = image.build_context(folder, "arm64")
    assert image.build_context(folder, "arm64") == first
    assert "wheels/pip-26.3-py3-none-any.whl" in members(first)
    assert len(calls) == 1
    assert {"--require-hashes", "--platform=manylinux2014_aarch64"} <= set(calls[0])
    image.build_context(folder, "amd64")
    assert len(calls) == 2


def test_wheels_of_the_folders_own_are_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_pip(monkeypatch, 0)
    (folder / "requirements.txt").write_text("own==1\n")
    (folder / "wheels").mkdir()
    (folder / "wheels" / "own.whl").write_text("own")
    assert "wheels/own.whl" in members(image.build_context(folder, "amd64"))
    assert not calls


def test_a_failed_download_is_one_line_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_pip(monkeypatch, 1)
    (folder / "requirements.txt").write_text("flask==3 --hash=sha256:00\n")
    with pytest.raises(image.ImageError, match=r"amd64 cannot be .*: ERROR: no such wheel$"):
        image.build_context(folder, "amd64")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_an_unknown_architecture_is_refused(folder: Path) -> None:
    (folder / "requirements.txt").write_text("flask==3 --hash=sha256:00\n")
    with pytest.raises(image.ImageError, match="riscv64"):
        image.build_context(folder, "riscv64")


def test_the_labs_images_have_the_names_of_the_knobs() -> None:
    from group_data import all as knobs

    tags = {item.name: item.tag for item in images.IMAGES}
    assert tags == {"app-base": knobs.app_base_image, "registry": knobs.registry_image}


def save(tar: Path, tag: str) -> None:
    """A file like docker save's, as far as we read it."""
    body = f'[{{"RepoTags": ["{tag}"]}}]'.encode()
    info = tarfile.TarInfo("manifest.json")
    info.size = len(body)
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar, "w") as file:
        file.addfile(info, io.BytesIO(body))


def test_images_that_are_there_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HASHISTACK_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")  # no docker, no mmdebstrap
    for item in images.IMAGES:
        save(tmp_path / "images" / f"{item.name}_amd64.tar", item.tag)
    images.fill("amd64")
    assert capsys.readouterr().out.count("found") == len(images.IMAGES)
    assert not (tmp_path / "ours.txt").exists()


def test_an_image_of_another_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASHISTACK_CACHE", str(tmp_path))
    save(tmp_path / "images" / "app-base_amd64.tar", "other:1")
    with pytest.raises(images.ImageError, match="does not hold hashistack/app-base:1: remove it"):
        images.fill("amd64")
