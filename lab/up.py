"""make up: from a bare machine to the app answering. Does only what is missing.

    make up [WORKERS=3] [PROXIES=1] [PROVIDER=docker] [HTTP_PORT=8080] [NETWORK=192.168.56] [SCHEDULER=nomad]

The choices are remembered in .lab.json. Uses Python's standard library alone: it makes .venv itself.
"""

from __future__ import annotations

import errno
import os
import platform
import runpy
import socket
import sys
import time
from typing import Any

from lab import controller, hosts, images, settings
from lab.command import output, run, stage
from lab.settings import ROOT, LabError, Settings
from tasks import mirror

PYINFRA = str(controller.VENV / "bin" / "pyinfra")
ARCHES = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


def main() -> None:
    start = time.monotonic()
    hosts_exist = bool(hosts.known_ids())
    lab = settings.choose(settings.load(), os.environ, hosts_exist)
    check(lab)
    lab.save()  # an interrupted run goes on with the shape that was asked for
    prepare_controller()
    with stage("Look for what an earlier lab left"):
        sweep(lab.network)
    with stage("Host image (Debian 12, systemd, sshd)"):
        if lab.provider == "docker":
            hosts.make_image(arch())
    with stage("Artifacts"):
        fill_mirror(lab, hosts_exist)
        images.fill(arch())
    lab.save()
    with stage(f"Hosts ({lab.workers} workers, {lab.proxies} proxies, {lab.provider})"):
        new = hosts.up(lab.provider)
    with stage("Deploy: pyinfra -y inventory.py deploy.py"):
        run(PYINFRA, "-y", "inventory.py", "deploy.py")
    release(everything_new=len(new) == lab.workers + lab.proxies)
    print(farewell(lab, time.monotonic() - start))


def check(lab: Settings) -> None:
    """Refuse in one line, before anything starts, what cannot end well. Raises LabError."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the system's python3 runs this
        raise LabError(f"Python {platform.python_version()}: use 3.11 or newer")
    arch()
    if not port_is_free(lab.http_port) and not hosts.hold_port(lab.provider, lab.http_port):
        raise LabError(
            f"port {lab.http_port} on localhost is in use: stop what listens there, or "
            f"`make up HTTP_PORT={lab.http_port + 1}`"
        )
    needed = controller.missing_packages()
    if needed and not controller.can_install():
        raise LabError(f"this machine lacks {', '.join(needed)}: install them, and run again")


def arch() -> str:
    """This machine's architecture, and so its hosts', as the publishers name it."""
    machine = platform.machine()
    if machine not in ARCHES:
        raise LabError(f"{machine}: the lab runs on amd64 and arm64")
    return ARCHES[machine]


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def prepare_controller() -> None:
    """Packages, virtual environment and Docker engine; silent about what is there."""
    needed = controller.missing_packages()
    if needed:
        with stage(f"Install {' '.join(needed)}"):
            controller.install_packages(needed)
    if controller.venv_is_stale():
        with stage("Virtual environment .venv"):
            controller.make_venv()
    if not controller.engine_answers():
        with stage("Start Docker"):
            controller.start_engine()


def sweep(network: str) -> None:
    hosts.remove(hosts.leftovers(hosts.containers(), hosts.known_ids(), network))
    hosts.destroy_unfinished()


def fill_mirror(lab: Settings, hosts_exist: bool) -> None:
    """Have the artifacts here, and settle what new hosts get where a pin cannot be had."""
    knobs = {**runpy.run_path(str(ROOT / "group_data" / "all.py")), **lab.data}
    scheduler, why = choose_scheduler(knobs, lab.data.get("scheduler", ""))
    lab.data["scheduler"] = scheduler
    print(f"    scheduler: {scheduler} ({why})", flush=True)
    fill("consul-template", knobs)
    pin = knobs["consul_version"]
    found = fill("consul", knobs, fall_back=not hosts_exist)
    if found.version != pin:
        lab.data["consul_version"] = found.version
        print(f"    consul {pin} cannot be had: these hosts get {found.version}", flush=True)


def fill(tool: str, knobs: dict[str, Any], fall_back: bool = False) -> mirror.Artifact:
    """The tool's zip for our hosts, verified."""
    get = mirror.fill_or_fall_back if fall_back else mirror.fill
    version = knobs[f"{tool.replace('-', '_')}_version"]
    artifact = get(tool, version, arch(), knobs["artifact_mirror"])
    print(f"    {tool} {artifact.version}: {artifact.origin}", flush=True)
    return artifact


def choose_scheduler(knobs: dict[str, Any], settled: str) -> tuple[str, str]:
    """The scheduler for these hosts, and why. settled: asked for, or what the hosts run; "" = open."""
    if (settled or knobs["scheduler"]) == "docker":
        return "docker", "as chosen"
    try:
        fill("nomad", knobs)
    except mirror.Unavailable as error:
        if settled == "nomad":
            raise
        return "docker", f"Nomad cannot be had: {error}"
    return "nomad", "as chosen" if settled else "its release is here"


def release(everything_new: bool) -> None:
    """The app's first version, only where it was never released."""
    version = runpy.run_path(str(ROOT / "group_data" / "all.py"))["app_first_version"]
    if not everything_new and "released: yes" in output(PYINFRA, "-y", "inventory.py", "lab/released.py"):
        return
    with stage(f"First release: pyinfra -y inventory.py release.py --data version={version}"):
        run(PYINFRA, "-y", "inventory.py", "release.py", "--data", f"version={version}")


def farewell(lab: Settings, seconds: float) -> str:
    vip = f"http://{lab.network}.20:8080"
    shared = f"\nThe proxies share {vip}: one of them answers there." if lab.proxies > 1 else ""
    return f"""
The app answers at http://localhost:{lab.http_port} ({seconds:.0f} s).{shared} Next:
    curl localhost:{lab.http_port}/version
    .venv/bin/pyinfra -y inventory.py release.py --data version=0.0.3
    make down"""


if __name__ == "__main__":
    try:
        main()
    except (LabError, mirror.MirrorError, images.ImageError) as error:
        sys.exit(f"make up: {error}")
    except KeyboardInterrupt:
        sys.exit("make up: interrupted; run it again to go on")
