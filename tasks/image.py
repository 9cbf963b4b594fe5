"""The controller's half of an image build: one tar with the app's folder and, for Python, its wheels.

The same folder gives the same tar and the same hash, on any machine. The builder needs no network:
what requirements.txt pins is downloaded here, for the builder's architecture, and COPYed by the
Dockerfile from wheels/, pip's own wheel included.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tasks.mirror import cache_dir, record

PYTHON = "3.11"  # of the app's base image
PIP = "pip==26.3 --hash=sha256:f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"
# Debian's names of the architectures, and the wheels' platforms for them.
PLATFORMS = {"amd64": "manylinux2014_x86_64", "arm64": "manylinux2014_aarch64"}
# Not part of the image: tests, version control, and what a run or an editor leaves behind.
IGNORED = {"tests", "__pycache__"}


class ImageError(Exception):
    """One line: what failed, and what to do."""


def source_hash(folder: Path) -> str:
    """sha256 (hex) over the folder's files in sorted order: path, mode (644 or 755), contents."""
    digest = hashlib.sha256()
    for path in _sources(folder):
        name, body = path.relative_to(folder).as_posix(), _contents(path)
        digest.update(f"{name}\0{_mode(path):o}\0{len(body)}\0".encode() + body)
    return digest.hexdigest()


def build_context(folder: Path, arch: str) -> bytes:
    """A tar for `docker build -`: the folder, and wheels/ if it has a requirements.txt.

    arch: amd64 or arm64. A wheels/ of the folder's own is used as it is. Raises ImageError.
    """
    if not (folder / "Dockerfile").is_file():
        raise ImageError(f"{folder}: no Dockerfile there: app_folder names the app's folder")
    files = [(path.relative_to(folder).as_posix(), path) for path in _sources(folder)]
    if (folder / "requirements.txt").is_file() and not (folder / "wheels").exists():
        wheels = fetch_wheels(folder / "requirements.txt", arch)
        files += [(f"wheels/{path.name}", path) for path in sorted(wheels.glob("*.whl"))]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, path in files:
            _add(tar, name, path)
    return buffer.getvalue()


def fetch_wheels(requirements: Path, arch: str) -> Path:
    """The folder in the cache with the wheels of requirements.txt and pip's; downloads them once.

    Every requirement needs --hash. Raises ImageError with pip's last line.
    """
    if arch not in PLATFORMS:
        raise ImageError(f"{arch}: wheels are known for {', '.join(PLATFORMS)} only")
    pins = requirements.read_text() + f"\n{PIP}\n"
    folder = cache_dir() / "wheels" / arch / hashlib.sha256(pins.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    print(f"wheels for {requirements} {arch}: downloading ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        _pip_download(pins, arch, part)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for wheel in folder.iterdir():
        record(wheel)
    return folder


def _pip_download(pins: str, arch: str, folder: Path) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(pins)
        file.flush()
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes"),
                *("--only-binary=:all:", f"--platform={PLATFORMS[arch]}"),
                *("--implementation=cp", f"--python-version={PYTHON}"),
                *(f"--requirement={file.name}", f"--dest={folder}"),
            ],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ImageError(f"wheels for {arch} cannot be downloaded: {reason}")


def _sources(folder: Path) -> Iterator[Path]:
    """The files and links that belong to the app, sorted by path; folders come with their files."""
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") and part != ".dockerignore" for part in parts)
        if hidden or IGNORED.intersection(parts) or path.suffix == ".pyc":
            continue
        if path.is_symlink() or path.is_file():
            yield path


def _contents(path: Path) -> bytes:
    """A file's bytes, or where a link points: links are kept, never followed."""
    return bytes(path.readlink()) if path.is_symlink() else path.read_bytes()


def _mode(path: Path) -> int:
    """644 or 755 by the owner's x bit, whatever the umask of the checkout was."""
    return 0o755 if path.is_symlink() or path.stat().st_mode & 0o100 else 0o644


def _add(tar: tarfile.TarFile, name: str, path: Path) -> None:
    """Add one file without its time and owner."""
    info = tarfile.TarInfo(name)
    info.mode = _mode(path)
    if path.is_symlink():
        info.type, info.linkname = tarfile.SYMTYPE, str(path.readlink())
        tar.addfile(info)
    else:
        body = path.read_bytes()
        info.size = len(body)
        tar.addfile(info, io.BytesIO(body))
