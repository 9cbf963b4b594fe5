"""The images that hosts get beside the app's own: the app's base, and the registry.

Each is pulled where images can be pulled, and made from Debian's packages where they cannot. It is
saved as <cache>/images/<name>_<arch>.tar, from where deploy.py takes it to the hosts. A tar that is
already there, from an earlier run or put there by somebody, is used as it is.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from tasks.mirror import cache_dir, record

LAB = Path(__file__).resolve().parent
RELEASE = "bookworm"


class ImageError(Exception):
    """One line: what failed, and what to do."""


@dataclass(frozen=True)
class Image:
    """An image: lab/<name>/Dockerfile on top of `public`, or of `packages` when that has no way in.

    filters: dpkg path-exclude/path-include patterns; the last that matches a file decides.
    hooks: shell lines run on the unpacked packages, with their folder as $1.
    """

    name: str
    tag: str  # as in group_data: app_base_image, registry_image
    public: str
    packages: tuple[str, ...]
    filters: tuple[str, ...]
    hooks: tuple[str, ...]


IMAGES = (
    Image(
        name="app-base",
        tag="hashistack/app-base:1",
        public="python:3.11-slim-bookworm",
        packages=("dash", "python3.11-minimal", "libpython3.11-stdlib"),
        filters=(
            "exclude=/*",
            "include=/bin/dash",
            "include=/lib*/ld-linux*",
            "include=/lib/*-linux-gnu/*",
            "include=/usr/lib/*-linux-gnu/*",
            "exclude=/usr/lib/*-linux-gnu/gconv/*",
            "include=/usr/bin/python3.11",
            "include=/usr/lib/python3.11/*",
            "exclude=/usr/lib/python3.11/ensurepip/*",
            "exclude=/usr/lib/python3.11/lib2to3/*",
            "exclude=/usr/lib/python3.11/pydoc_data/*",
            "exclude=/usr/lib/python3.11/test/*",
            "include=/etc/mime.types",
            "include=/usr/share/doc/*/copyright",
        ),
        hooks=(
            'ln -s dash "$1/bin/sh"',
            'ln -s python3.11 "$1/usr/bin/python3"',
            # The app's root is read-only: without this each start would compile the library anew.
            'test $COMPILE = no || chroot "$1" python3 -m compileall -q /usr/lib/python3.11',
        ),
    ),
    Image(
        name="registry",
        tag="hashistack/registry:2",
        public="registry:2",
        packages=("docker-registry",),
        # The binary needs libc alone; the rest of the dependencies serve the package's scripts.
        filters=(
            "exclude=/*",
            "include=/lib*/ld-linux*",
            "include=/lib/*/libc.so.6",
            "include=/usr/bin/docker-registry",
            "include=/usr/share/doc/docker-registry/copyright",
            "include=/usr/share/doc/libc6/copyright",
        ),
        hooks=('mkdir -p "$1/bin"', 'mv "$1/usr/bin/docker-registry" "$1/bin/registry"'),
    ),
)


def fill(arch: str) -> None:
    """Put every image for `arch` (amd64, arm64) into the cache; do nothing for those that are there.

    Raises ImageError.
    """
    for image in IMAGES:
        tar = cache_dir() / "images" / f"{image.name}_{arch}.tar"
        start = time.monotonic()
        how = "found" if tar.exists() else _make(image, arch, tar)
        if image.tag not in _tags(tar):
            raise ImageError(f"{tar} does not hold {image.tag}: remove it, and run again")
        print(
            f"image {image.tag} {arch}: {how}, {tar.stat().st_size / 1e6:.0f} MB, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )


def _make(image: Image, arch: str, tar: Path) -> str:
    """Pull or make the image, save it, leave Docker as it was; return which of the two."""
    print(f"image {image.tag} {arch}: ...", flush=True)
    before = _run("docker", "images", "--quiet", image.public)
    pulled = pull(image.public, arch)
    base = image.public if pulled else _import(image, arch)
    _run(
        *("docker", "build", "--quiet", f"--platform=linux/{arch}", f"--build-arg=BASE={base}"),
        *(f"--tag={image.tag}", str(LAB / image.name)),
    )
    tar.parent.mkdir(parents=True, exist_ok=True)
    part = tar.with_suffix(".part")
    _run("docker", "save", f"--output={part}", image.tag)
    part.replace(tar)
    record(tar)
    _run("docker", "rmi", image.tag, *(() if pulled and before else (base,)))
    return "pulled" if pulled else "made from Debian's packages"


def _import(image: Image, arch: str) -> str:
    """Unpack the Debian packages, without installing them, into a Docker image; return its name."""
    native = _run("dpkg", "--print-architecture").strip() == arch
    tar = cache_dir() / "images" / f"{image.name}_{arch}.rootfs.tar"
    tar.parent.mkdir(parents=True, exist_ok=True)
    _run(
        *("mmdebstrap", "--quiet", "--variant=extract", f"--architectures={arch}"),
        *(f"--include={package}" for package in image.packages),
        *(f"--dpkgopt=path-{pattern}" for pattern in image.filters),
        *(f"--extract-hook={hook}" for hook in image.hooks),
        # The controller's own apt sources and resolv.conf have no business in the image.
        '--extract-hook=cd "$1" && rm -rf etc/apt etc/dpkg etc/fstab etc/hostname etc/resolv.conf var/*',
        *("--skip=cleanup", "--skip=output/dev"),
        *(RELEASE, str(tar), *apt_sources()),
        env={"SOURCE_DATE_EPOCH": "0", "COMPILE": "yes" if native else "no"},
    )
    _run("docker", "import", f"--platform=linux/{arch}", str(tar), f"{image.tag}-rootfs")
    tar.unlink()
    return f"{image.tag}-rootfs"


def apt_sources() -> list[str]:
    """The machine's apt sources that offer RELEASE; with none, mmdebstrap knows where to go."""
    apt = Path("/etc/apt")
    files = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.*"))]
    suite = re.compile(rf"(?<!\S){RELEASE}(?!\S)")
    return [str(file) for file in files if file.is_file() and suite.search(file.read_text())]


def pull(public: str, arch: str) -> bool:
    """Pull a public image; False where that is not possible, the reason printed."""
    try:
        _run("docker", "pull", "--quiet", f"--platform=linux/{arch}", public)
    except ImageError as error:
        print(f"{public}: {error}", flush=True)
        return False
    return True


def _tags(tar: Path) -> list[str]:
    """The image names in a file made by docker save."""
    with tarfile.open(tar) as file:
        manifest = file.extractfile("manifest.json")
        return [tag for image in json.load(manifest) for tag in image["RepoTags"]] if manifest else []


def _run(*argv: str, env: dict[str, str] | None = None) -> str:
    """Run a command and return what it prints; raises ImageError with its last line."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **(env or {})})
    except FileNotFoundError:
        raise ImageError(f"{argv[0]} is missing: install it, or pull images from a registry") from None
    if done.returncode:
        raise ImageError(f"{' '.join(argv[:2])} failed: {_last_line(done.stderr)}")
    return done.stdout


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


if __name__ == "__main__":
    try:
        fill(sys.argv[1])
    except ImageError as error:
        sys.exit(str(error))
