"""The artifact mirror: zips of the tools on the controller, verified before they are put in place.

    python -m tasks.mirror consul 1.14.11 amd64

One folder, laid out like the publisher's site: <tool>/<version>/<tool>_<version>_linux_<arch>.zip with
<tool>_<version>_SHA256SUMS and its .sig. It is filled from, in this order: what is already there; the
user's own mirror (`artifact_mirror`) or the publisher's site; for the tools in lab/go, a build.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO

PUBLISHER = "https://releases.hashicorp.com"
# The publisher's public key, from https://www.hashicorp.com/security; fingerprint
# C874 011F 0AB4 0511 0D02 1055 3436 5D94 72D7 468F, valid to 2030-03-01.
KEY = Path(__file__).resolve().parent.parent / "keys" / "hashicorp.asc"
# One Go module for each tool that can be built; it requires exactly the version that is built.
GO_MODULES = Path(__file__).resolve().parent.parent / "lab" / "go"

TIMEOUT_S = 10  # to connect, and between two pieces of a download
PROGRESS_S = 5
CHUNK = 1 << 16
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

_one_at_a_time = Lock()  # pyinfra asks for every host at the same time
_unreachable: dict[str, str] = {}  # source -> why: asked once in a run


class MirrorError(Exception):
    """One line: what is wrong, and what to do."""


class Unavailable(MirrorError):
    """The release cannot be had from its source; a build may do instead."""


@dataclass(frozen=True)
class Artifact:
    """A verified zip. `signed`: its sum is signed by the publisher."""

    tool: str
    version: str
    arch: str  # amd64, arm64
    zip: Path
    sha256: str
    signed: bool

    @property
    def origin(self) -> str:
        return "signed by the publisher" if self.signed else "local build, unsigned"


def cache_dir() -> Path:
    """$HASHISTACK_CACHE, else pyinfra-hashistack under $XDG_CACHE_HOME, else under ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyinfra-hashistack"
    return Path(os.environ.get("HASHISTACK_CACHE") or cache)


def record(path: Path) -> None:
    """List a file in the cache as downloaded or built by us, so that `make clean` may remove it."""
    line = str(path.relative_to(cache_dir()))
    if line not in _ours():
        with (cache_dir() / "ours.txt").open("a") as ours:
            ours.write(f"{line}\n")


def _ours() -> list[str]:
    ours = cache_dir() / "ours.txt"
    return ours.read_text().splitlines() if ours.exists() else []


def fill(tool: str, version: str, arch: str, source: str = "") -> Artifact:
    """Find, download or build a tool's zip, and verify it.

    source: the user's own mirror, a URL or a folder; "" = the publisher's site. Raises MirrorError.
    """
    with _one_at_a_time, _disk_errors():
        artifact = local(cache_dir(), tool, version, arch)
        if artifact:
            return artifact
        try:
            if source and "://" not in source:
                return _from_folder(Path(source), tool, version, arch)
            return _download(source or PUBLISHER, tool, version, arch)
        except Unavailable:
            if buildable(tool) != version:
                raise
        return _build(tool, version, arch)


def fill_or_fall_back(tool: str, pin: str, arch: str, source: str = "") -> Artifact:
    """`fill` the pin or, where it cannot be had, the version that can be built from source.

    Only for hosts that do not run the tool yet. The caller says which version it got.
    """
    try:
        return fill(tool, pin, arch, source)
    except Unavailable:
        fallback = buildable(tool)
        if not fallback:
            raise
        return fill(tool, fallback, arch, source)


def buildable(tool: str) -> str | None:
    """The version that lab/go/<tool>/go.mod requires, or None: the tool cannot be built."""
    module = GO_MODULES / tool / "go.mod"
    if not module.exists():
        return None
    required = next(line for line in module.read_text().splitlines() if line.startswith("require "))
    return required.rpartition(" v")[2]


def build(tool: str, version: str, arch: str) -> Artifact:
    """Build a tool's zip from its Go module into the cache, unsigned. Raises MirrorError."""
    with _one_at_a_time, _disk_errors():
        return _build(tool, version, arch)


def local(root: Path, tool: str, version: str, arch: str) -> Artifact | None:
    """The zip in a folder, or None. Its sum must be right, and signed if there is a signature."""
    zip_, sums = _zip(root, tool, version, arch), _sums(root, tool, version)
    if not zip_.exists():
        return None
    if not sums.exists():
        raise MirrorError(f"{zip_}: no {sums.name} beside it; add the publisher's, or remove the zip")
    signature = _signature(sums)
    if signature.exists():
        _verify_signature(sums, signature)
    return Artifact(tool, version, arch, zip_, _verify_sum(zip_, sums), signature.exists())


def _zip(root: Path, tool: str, version: str, arch: str) -> Path:
    return root / tool / version / f"{tool}_{version}_linux_{arch}.zip"


def _sums(root: Path, tool: str, version: str) -> Path:
    return root / tool / version / f"{tool}_{version}_SHA256SUMS"


def _signature(sums: Path) -> Path:
    return sums.with_name(f"{sums.name}.sig")


def _verify_sum(zip_: Path, sums: Path) -> str:
    """The sum of a zip, which is the one that the sums file lists."""
    listed = dict(line.split()[::-1] for line in sums.read_text().splitlines() if line.strip())
    expected = listed.get(zip_.name)
    if not expected:
        raise MirrorError(f"{sums}: no line for {zip_.name}; add its sum, or remove the zip")
    with zip_.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise MirrorError(f"{zip_}: wrong sum, expected {expected}, found {found}; remove it and run again")
    return found


def _verify_signature(sums: Path, signature: Path) -> None:
    """GnuPG finds a good signature by the key in `keys`, and by no other."""
    with tempfile.TemporaryDirectory() as home:
        keyring = f"{home}/publisher.gpg"
        _gpg("gpg", f"--homedir={home}", "--batch", f"--output={keyring}", "--dearmor", str(KEY))
        status = _gpg(
            *("gpgv", f"--homedir={home}", f"--keyring={keyring}", "--status-fd=1"),
            *(str(signature), str(sums)),
        )
    if "[GNUPG:] GOODSIG " not in status:
        raise MirrorError(
            f"{signature}: not the publisher's signature of {sums.name}; remove both and run again"
        )


def _gpg(*argv: str) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        raise MirrorError(f"{argv[0]} is missing: install GnuPG (apt install gpg gpgv)") from None


def _from_folder(root: Path, tool: str, version: str, arch: str) -> Artifact:
    """A zip in the user's own folder is used where it is."""
    artifact = local(root, tool, version, arch)
    if not artifact:
        raise Unavailable(f"{_zip(root, tool, version, arch)}: no such file; {_next_step(tool, version)}")
    return artifact


def _download(source: str, tool: str, version: str, arch: str) -> Artifact:
    """Download sums, signature and zip into a folder of their own, verify them, then move them in."""
    stale = _own_unsigned(tool, version)
    with _scratch() as root:
        zip_, sums = _zip(root, tool, version, arch), _sums(root, tool, version)
        zip_.parent.mkdir(parents=True)
        _get(source, tool, sums)
        try:
            _get(source, tool, _signature(sums))
        except Unavailable as error:
            raise MirrorError(f"{error}; what comes from a URL must be signed") from None
        _verify_signature(sums, _signature(sums))
        _get(source, tool, zip_)
        sha256 = _verify_sum(zip_, sums)
        for file in stale:
            file.unlink(missing_ok=True)
        # The zip last: without it, nothing counts as being there.
        for file in (sums, _signature(sums), zip_):
            _put_in_place(file, root)
    return Artifact(tool, version, arch, _zip(cache_dir(), tool, version, arch), sha256, True)


def _own_unsigned(tool: str, version: str) -> list[Path]:
    """Our own builds of other architectures, which the publisher's sums would call wrong.

    Unsigned sums that somebody put there stay, and are an error: they say what the folder may hold.
    """
    sums = _sums(cache_dir(), tool, version)
    if not sums.exists() or _signature(sums).exists():
        return []
    own = [cache_dir() / line for line in _ours() if line.startswith(f"{tool}/{version}/")]
    if sums not in own:
        raise MirrorError(f"{sums}: the zip that it lists is missing; add it, or remove this file")
    return own


def _get(source: str, tool: str, file: Path) -> None:
    """Download one file; a source that cannot be reached is not asked again in this run."""
    version = file.parent.name
    url = "/".join([source.rstrip("/"), tool, version, file.name])
    if source in _unreachable:
        raise Unavailable(
            f"{url}: cannot be downloaded ({_unreachable[source]}); {_next_step(tool, version)}"
        )
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, file.open("wb") as out:
            _copy(answer, out, file.name, int(answer.headers.get("Content-Length") or 0))
        return
    except urllib.error.HTTPError as error:
        reason = f"HTTP {error.code}"
    except (OSError, EOFError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = _unreachable[source] = str(getattr(error, "reason", error))
    raise Unavailable(f"{url}: cannot be downloaded ({reason}); {_next_step(tool, version)}")


def _next_step(tool: str, version: str) -> str:
    step = f"put the zip and its SHA256SUMS into {cache_dir() / tool / version}, or set artifact_mirror"
    fallback = buildable(tool)
    return f"{step}, or set {tool.replace('-', '_')}_version to {fallback}" if fallback else step


def _copy(answer: IO[bytes], out: IO[bytes], name: str, size: int) -> None:
    done, shown = 0, time.monotonic()
    while data := answer.read(CHUNK):
        out.write(data)
        done += len(data)
        if time.monotonic() - shown > PROGRESS_S:
            shown = time.monotonic()
            _say(f"{name}: {done / 1e6:.0f} of {size / 1e6:.0f} MB")
    if done < size:
        raise EOFError(f"the connection was closed after {done} of {size} bytes")


def _build(tool: str, version: str, arch: str) -> Artifact:
    if buildable(tool) != version:
        known = buildable(tool)
        raise MirrorError(f"{tool} {version} cannot be built" + (f"; {known} can" if known else ""))
    old = _sums(cache_dir(), tool, version)
    if _signature(old).exists():
        raise MirrorError(f"{old}: signed by the publisher; add its zip for {arch} beside it")
    with _scratch() as root:
        zip_, sums = _zip(root, tool, version, arch), _sums(root, tool, version)
        zip_.parent.mkdir(parents=True)
        _go_build(tool, version, arch, root / tool / tool)
        _pack(root / tool / tool, zip_)
        with zip_.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        _write_sums(sums, old, zip_.name, sha256)
        for path in (sums, zip_):
            _put_in_place(path, root)
    return Artifact(tool, version, arch, _zip(cache_dir(), tool, version, arch), sha256, False)


def _go_build(tool: str, version: str, arch: str, binary: Path) -> None:
    """Run `go build`, and say every few seconds that it is still at work."""
    env = {"CGO_ENABLED": "0", "GOOS": "linux", "GOARCH": arch, "GOWORK": "off"}
    argv = ["go", "build", "-trimpath", "-mod=readonly", "-ldflags=-s -w", f"-o={binary}"]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        try:
            process = subprocess.Popen(
                [*argv, f"github.com/hashicorp/{tool}"],
                cwd=GO_MODULES / tool,
                env=os.environ | env,
                stdout=log,
                stderr=log,
            )
        except FileNotFoundError:
            raise MirrorError(
                f"{tool} {version} is built with Go, and there is no `go`: install it from go.dev/dl"
            ) from None
        while True:
            try:
                failed = process.wait(PROGRESS_S)
                break
            except subprocess.TimeoutExpired:
                _say(f"building {tool} {version} {arch}: {time.monotonic() - start:.0f} s")
        log.seek(0)
        if failed:
            lines = [line for line in log if "downloading" not in line] or ["no message"]
            raise MirrorError(f"{tool} {version} does not build: {lines[-1].strip()}")


def _pack(binary: Path, zip_: Path) -> None:
    """The binary alone, with a fixed time: the same source gives the same zip."""
    with zipfile.ZipFile(zip_, "w") as archive:
        info = zipfile.ZipInfo(binary.name)
        info.compress_type = zipfile.ZIP_DEFLATED
        info.external_attr = 0o755 << 16
        with binary.open("rb") as source, archive.open(info, "w") as target:
            shutil.copyfileobj(source, target, CHUNK)


def _write_sums(new: Path, old: Path, name: str, sha256: str) -> None:
    """The sums that are there, with this zip's: another architecture may have been built before."""
    lines = old.read_text().splitlines() if old.exists() else []
    kept = [line for line in lines if not line.endswith(f"  {name}")]
    new.write_text("".join(f"{line}\n" for line in [*kept, f"{sha256}  {name}"]))


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder on the cache's disk, so that a move out of it is atomic."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=cache_dir()) as root:
        yield Path(root)


def _put_in_place(file: Path, root: Path) -> None:
    target = cache_dir() / file.relative_to(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():  # a file that somebody put there stays theirs
        record(target)
    file.replace(target)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise MirrorError(
                f"{cache_dir()}: the disk is full; free some space, or set HASHISTACK_CACHE"
            ) from None
        raise MirrorError(f"{error.filename or cache_dir()}: {error.strerror or error}") from None


def _say(line: str) -> None:
    print(f"    {line}", file=sys.stderr, flush=True)


def main() -> None:
    if len(sys.argv) not in (4, 5):
        sys.exit("usage: python -m tasks.mirror TOOL VERSION ARCH [MIRROR]")
    try:
        artifact = fill(*sys.argv[1:])
    except MirrorError as error:
        sys.exit(str(error))
    print(f"{artifact.zip}: {artifact.sha256}, {artifact.origin}")


if __name__ == "__main__":
    main()
