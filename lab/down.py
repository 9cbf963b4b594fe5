"""make down: the lab is gone. make clean (python3 -m lab.down --clean): and all that we brought here.

Never removes a file that somebody else put into the cache, nor a mirror of the user's own.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from lab import controller, hosts, settings
from lab.command import output, quietly, stage
from lab.settings import ROOT, LabError
from tasks import mirror

TRACES = (".venv", ".vagrant", ".mypy_cache", ".ruff_cache", ".pytest_cache")


def down() -> None:
    """Remove hosts, their volumes and networks, and the lab's settings."""
    made = hosts.machines(finished=True) | hosts.machines(finished=False)
    if made and not controller.engine_answers():
        with stage("Start Docker"):
            controller.start_engine()
    with stage("Remove the hosts"):
        if controller.engine_answers():
            # Without this, Vagrant would wait for each system to shut down in order.
            hosts.remove([c for c in hosts.containers() if c.folder == str(ROOT)])
            hosts.remove_network(settings.load().network)
        if made:
            quietly("vagrant", "destroy", "--force")
    for folder in (hosts.VAGRANT / "machines", settings.SECRETS):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (hosts.KNOWN_HOSTS, hosts.SSH_CONFIG, settings.FILE):
        file.unlink(missing_ok=True)


def clean() -> None:
    """Remove also the images, what is in the cache by our doing, and .venv."""
    with stage("Remove what was downloaded and built"):
        if controller.engine_answers():
            remove_images()
            controller.stop_own_engine()
        empty_cache(mirror.cache_dir())
        for name in TRACES:
            shutil.rmtree(ROOT / name, ignore_errors=True)


def remove_images() -> None:
    """Remove our images, unless the hosts of another checkout came from them."""
    folders = {container.folder for container in hosts.containers()}
    if folders:
        print(f"    the images stay: the lab of {', '.join(sorted(folders))} uses them", flush=True)
        return
    images = output("docker", "images", "--quiet", "--filter=reference=hashistack/*").split()
    if images:
        quietly("docker", "rmi", "--force", *dict.fromkeys(images))


def empty_cache(cache: Path) -> None:
    """Remove the files that ours.txt lists, and the folders that this leaves empty."""
    ours = cache / "ours.txt"
    listed = ours.read_text().splitlines() if ours.exists() else []
    for file in [*(cache / line for line in listed), ours]:
        file.unlink(missing_ok=True)
    folders = (path for path in cache.rglob("*") if path.is_dir())
    for folder in [*sorted(folders, reverse=True), cache]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


if __name__ == "__main__":
    try:
        down()
        if "--clean" in sys.argv:
            clean()
    except LabError as error:
        sys.exit(f"make {'clean' if '--clean' in sys.argv else 'down'}: {error}")
