"""The lab's hosts: their image, what an earlier lab left behind, and Vagrant, which makes them."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from lab.command import output, quietly, run, succeeds
from lab.images import apt_sources, pull
from lab.settings import NETWORKS, ROOT, LabError

RELEASE = "bookworm"
PUBLIC_IMAGE = "debian:12"
BASE_IMAGE = "hashistack/debian:12"
HOST_IMAGE = "hashistack/host:12"
LABEL = "hashistack.lab"  # on each host container: the folder whose `make up` made it
VAGRANT = ROOT / ".vagrant"
KNOWN_HOSTS = VAGRANT / "known_hosts"
SSH_CONFIG = VAGRANT / "ssh-config"


@dataclass(frozen=True)
class Container:
    """A lab host that Docker knows, of this or another checkout."""

    id: str
    name: str
    folder: str
    running: bool
    networks: tuple[str, ...]


def make_image(arch: str) -> None:
    """Have the host image: Debian pulled, or made from this machine's apt sources; then lab/host-image."""
    if not succeeds("docker", "image", "inspect", BASE_IMAGE):
        _make_base(arch)
    # Docker's cache makes this quick when nothing changed.
    quietly(
        *("docker", "build", f"--build-arg=BASE={BASE_IMAGE}", f"--tag={HOST_IMAGE}"),
        str(ROOT / "lab" / "host-image"),
    )


def _make_base(arch: str) -> None:
    present = succeeds("docker", "image", "inspect", PUBLIC_IMAGE)
    if present or pull(PUBLIC_IMAGE, arch):
        run("docker", "tag", PUBLIC_IMAGE, BASE_IMAGE)
        if not present:
            run("docker", "rmi", "--no-prune", PUBLIC_IMAGE)  # only our own name stays, for make clean
        return
    print(f"    making {BASE_IMAGE} with mmdebstrap", flush=True)
    root = subprocess.Popen(
        ["mmdebstrap", "--quiet", "--variant=minbase", "--skip=output/dev", RELEASE, "-", *apt_sources()],
        stdout=subprocess.PIPE,
    )
    imported = subprocess.run(["docker", "import", "-", BASE_IMAGE], stdin=root.stdout).returncode
    if root.wait() or imported:
        succeeds("docker", "rmi", BASE_IMAGE)
        raise LabError("mmdebstrap could not make Debian's root file system: see above")


def containers() -> list[Container]:
    """All lab hosts that Docker has, of every checkout."""
    line = '{{.ID}}\t{{.Names}}\t{{.Label "' + LABEL + '"}}\t{{.State}}\t{{.Networks}}'
    found = output("docker", "ps", "--all", "--no-trunc", f"--filter=label={LABEL}", f"--format={line}")
    rows = [row.split("\t") for row in found.splitlines()]
    return [
        Container(id_, name, folder, state == "running", tuple(networks.split(",")))
        for id_, name, folder, state, networks in rows
    ]


def network_name(network: str) -> str:
    """Vagrant's name, in Docker, for the network of the private addresses `network`.1 to .254."""
    return f"vagrant_network_{network}.0/24"


def machines(finished: bool) -> dict[str, str]:
    """Name -> id of the machines that Vagrant made in this folder, or only began to make.

    The last thing it does for a new machine is to write the key that it has made for it.
    """
    ids = VAGRANT.glob("machines/*/*/id")
    return {
        file.parts[-3]: file.read_text().strip()
        for file in ids
        if file.with_name("private_key").exists() == finished
    }


def known_ids() -> set[str]:
    """The ids of the machines that Vagrant made in this folder."""
    return set(machines(finished=True).values())


def leftovers(found: list[Container], ours: set[str], network: str) -> list[Container]:
    """The containers that are in the way: no folder answers for them, or `vagrant up` was interrupted.

    The folder is gone, or it is ours and Vagrant lost its notes, or has none that it finished.

    Raises LabError if another checkout's lab runs at our addresses. One that stopped is not in the way.
    """
    lost = []
    for container in found:
        at_our_addresses = network_name(network) in container.networks
        if container.id in ours and at_our_addresses:
            continue
        if container.folder == str(ROOT) or not Path(container.folder).exists():
            lost.append(container)
        elif container.running and at_our_addresses:
            raise LabError(
                f"the lab of {container.folder} is running at the same addresses: "
                f"`make -C {container.folder} down` first, or choose another NETWORK: "
                f"{NETWORKS[0]} to {NETWORKS[-1]}"
            )
    return lost


def destroy_unfinished() -> None:
    """Remove what an interrupted `vagrant up` began: the next one would take it for finished."""
    if names := machines(finished=False):
        print(f"    removing what was only begun: {', '.join(sorted(names))}", flush=True)
        quietly("vagrant", "destroy", "--force", *names)


def remove(found: list[Container]) -> None:
    """Remove containers with the anonymous volumes that belong to them."""
    if found:
        print(f"    removing {', '.join(container.name for container in found)}", flush=True)
        quietly("docker", "rm", "--force", "--volumes", *(container.id for container in found))


def remove_network(network: str) -> None:
    """Remove the private network, unless another checkout's hosts belong to it, even stopped ones."""
    name = network_name(network)
    members = [c for c in containers() if name in c.networks]
    if not members and succeeds("docker", "network", "inspect", name):
        quietly("docker", "network", "rm", name)


def hold_port(provider: str, port: int) -> bool:
    """The controller's port is taken by a host of ours, or by one whose folder is gone, which we remove."""
    if provider != "docker":
        return any(VAGRANT.glob(f"machines/proxy-*/{provider}/id"))
    if not succeeds("docker", "version"):
        return False
    line = '{{.Label "' + LABEL + '"}}'
    found = output("docker", "ps", f"--filter=label={LABEL}", f"--filter=publish={port}", f"--format={line}")
    return any(folder == str(ROOT) or not Path(folder).exists() for folder in found.splitlines())


def all_run(provider: str) -> bool:
    """Every host that Vagrant made is up, as Docker says; with other providers Vagrant must look."""
    return provider == "docker" and known_ids() <= {c.id for c in containers() if c.running}


def addresses() -> dict[str, str]:
    """Name -> private address, as inventory.py has them."""
    hosts: dict[str, str] = json.loads(output("python3", "inventory.py"))
    return hosts


def answers(address: str, port: int = 22, timeout_s: float = 0.5) -> bool:
    """Something listens there, on a network that this machine is on itself.

    Beyond the gateway any address may seem to answer, and none is ours to knock at.
    """
    if not on_our_network(address):
        return False
    try:
        socket.create_connection((address, port), timeout_s).close()
    except OSError:
        return False
    return True


def on_our_network(address: str) -> bool:
    """This machine has an address in the same /24. To connect a UDP socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            return False
        own = str(probe.getsockname()[0])
    return own.rpartition(".")[0] == address.rpartition(".")[0]


def missing(provider: str) -> dict[str, str]:
    """Name -> address of the hosts that are not made yet."""
    known = known_ids()
    if provider == "docker":
        known &= {container.id for container in containers()}
    made = {name for name, id_ in machines(finished=True).items() if id_ in known}
    return {name: address for name, address in addresses().items() if name not in made}


def up(provider: str) -> dict[str, str]:
    """Make and start the hosts, in parallel; returns those that are new. Raises LabError."""
    new = missing(provider)
    for name, address in new.items():
        if answers(address):
            raise LabError(f"{name}: another machine answers at {address}: stop it, and run again")
    forget_host_keys(KNOWN_HOSTS, set(new.values()))
    if new or not all_run(provider):
        run("vagrant", "up", "--provider", provider)
    find_the_way_in()
    return new


def forget_host_keys(file: Path, gone: set[str]) -> None:
    """A new host has a new key: drop what is known of its address. The file exists afterwards."""
    file.parent.mkdir(exist_ok=True)
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    kept = [line for line in lines if not line.startswith(tuple(f"{address} " for address in gone))]
    file.write_text("".join(kept))


def find_the_way_in() -> None:
    """Where the private addresses do not reach (Docker Desktop), SSH goes as Vagrant says."""
    deadline = time.monotonic() + 5
    SSH_CONFIG.unlink(missing_ok=True)
    waiting = set(addresses().values())
    while waiting:
        waiting = {address for address in waiting if not answers(address)}
        if time.monotonic() > deadline:
            SSH_CONFIG.write_text(output("vagrant", "ssh-config"))
            return
