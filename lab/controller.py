"""What this machine, the controller, needs: packages, the virtual environment, a Docker engine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from pathlib import Path

from lab.command import PATH, SUDO, output, run, succeeds
from lab.settings import ROOT, LabError

VENV = ROOT / ".venv"
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")
MADE_FROM = VENV / "made-from"
ENGINE_LOG = ROOT / ".vagrant" / "dockerd.log"
ENGINE_PID = ROOT / ".vagrant" / "dockerd.pid"
ENGINE_DEADLINE_S = 60
# Debian's package for each command that must be there.
PACKAGES = {"vagrant": "vagrant", "mmdebstrap": "mmdebstrap", "gpg": "gpg", "gpgv": "gpgv"}


def missing_packages() -> list[str]:
    """The Debian packages that this machine still needs."""
    missing = [package for command, package in PACKAGES.items() if not shutil.which(command, path=PATH)]
    if not engine_answers() and not shutil.which("dockerd", path=PATH):
        missing.append("docker.io")
    if not importlib.util.find_spec("ensurepip"):
        missing.append("python3-venv")
    if "mmdebstrap" in missing and SUDO:
        missing.append("uidmap")  # lets it work without root
    return missing


def can_install() -> bool:
    """True on Debian and its kin, such as Ubuntu."""
    return bool(shutil.which("apt-get"))


def install_packages(packages: list[str]) -> None:
    """Install from the machine's own apt sources. Raises LabError."""
    argv = [*SUDO, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"]
    # A third party's broken source makes an update fail although all that we need arrived.
    succeeds(*argv, "update")
    run(*argv, "install", "--no-install-recommends", *packages)


def venv_is_stale() -> bool:
    """True unless .venv was made, to the end, from requirements*.txt as they are now."""
    return not MADE_FROM.exists() or MADE_FROM.read_text() != _requirements()


def make_venv() -> None:
    """Make .venv as requirements*.txt say. Raises LabError."""
    MADE_FROM.unlink(missing_ok=True)
    run("python3", "-m", "venv", str(VENV))
    run(f"{VENV}/bin/pip", "install", "--quiet", "--disable-pip-version-check", "-r", REQUIREMENTS[-1])
    MADE_FROM.write_text(_requirements())


def _requirements() -> str:
    return "".join((ROOT / name).read_text() for name in REQUIREMENTS)


def engine_answers() -> bool:
    return succeeds("docker", "version", "--format", "{{.Server.Version}}")


def start_engine() -> None:
    """Start the Docker engine and wait until it answers. Raises LabError."""
    _refuse_without_rights()
    if shutil.which("systemctl") and Path("/run/systemd/system").exists():
        run(*SUDO, "systemctl", "start", "docker")
    elif not shutil.which("dockerd", path=PATH):
        raise LabError("Docker does not answer: start it, and run again")
    elif not _running(Path("/var/run/docker.pid"), "dockerd"):
        _start_detached()
    deadline = time.monotonic() + ENGINE_DEADLINE_S
    while not engine_answers():
        _refuse_without_rights()
        if time.monotonic() > deadline:
            raise LabError(f"dockerd does not answer after {ENGINE_DEADLINE_S} s: see {ENGINE_LOG}")
        time.sleep(0.5)


def _start_detached() -> None:
    """Start dockerd where no service manager does: it outlives us, and logs to ENGINE_LOG."""
    for file, process in (
        ("/var/run/docker.pid", "dockerd"),
        ("/var/run/docker/containerd/containerd.pid", "containerd"),
    ):
        # After a crash the file stays, and its number may be another process's by now: the engine
        # would take that one for itself and refuse to start.
        if not _running(Path(file), process):
            run(*SUDO, "rm", "-f", file)
    ENGINE_LOG.parent.mkdir(exist_ok=True)
    run(
        *(*SUDO, "sh", "-c", 'setsid dockerd >>"$1" 2>&1 </dev/null & echo $! >"$2"'),
        *("sh", str(ENGINE_LOG), str(ENGINE_PID)),
    )


def stop_own_engine() -> None:
    """Stop the engine that start_engine started, unless containers run in it."""
    if _running(ENGINE_PID, "dockerd") and not output("docker", "ps", "--quiet").strip():
        run(*SUDO, "kill", ENGINE_PID.read_text().strip())


def _running(pid_file: Path, process: str) -> bool:
    """The number in pid_file is a live process of that name."""
    if not pid_file.exists():
        return False
    comm = Path("/proc") / pid_file.read_text().strip() / "comm"
    return comm.exists() and comm.read_text().strip() == process


def _refuse_without_rights() -> None:
    socket = Path("/var/run/docker.sock")
    if socket.exists() and not os.access(socket, os.W_OK) and "DOCKER_HOST" not in os.environ:
        raise LabError(
            "no right to use Docker: run `sudo usermod -aG docker $USER`, log in again, and run again"
        )
