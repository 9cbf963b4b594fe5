"""What `make up` chose, remembered in .lab.json so that plain pyinfra and vagrant agree with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / ".lab.json"
SECRETS = ROOT / ".vagrant" / "secrets"  # the lab's own: they go with its hosts
PROVIDERS = ("docker", "virtualbox", "libvirt")
SCHEDULERS = ("nomad", "docker")
# All that VirtualBox allows for host-only networks: 192.168.56.0/21.
NETWORKS = tuple(f"192.168.{n}" for n in range(56, 64))
# What make up finds out for new hosts: kept only as long as these hosts live.
FOUND_OUT = ("scheduler", "consul_version")


class LabError(Exception):
    """One line: what is wrong, and what to do next."""


@dataclass
class Settings:
    """The lab's shape.

    network: the first three numbers of the hosts' private addresses. data: pyinfra host data (scheduler,
    versions); it wins over group_data.
    """

    workers: int = 3
    proxies: int = 1
    provider: str = "docker"
    http_port: int = 8080
    network: str = NETWORKS[0]
    data: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        FILE.write_text(json.dumps(asdict(self), indent=2) + "\n")


def load() -> Settings:
    """The remembered settings, or the defaults above when no lab was made yet."""
    return Settings(**json.loads(FILE.read_text())) if FILE.exists() else Settings()


def choose(known: Settings, asked: Mapping[str, str], hosts_exist: bool) -> Settings:
    """The settings for this `make up`: what was remembered, and what `asked` changes.

    asked: WORKERS, PROXIES, PROVIDER, HTTP_PORT, NETWORK, SCHEDULER, as `make up NAME=value` gives them.
    A lab whose hosts exist can only grow. Raises LabError.
    """
    new = Settings(
        workers=_number(asked, "WORKERS", known.workers, 3, 10),
        proxies=_number(asked, "PROXIES", known.proxies, 1, 2),
        provider=_one_of(asked, "PROVIDER", known.provider, PROVIDERS),
        http_port=_number(asked, "HTTP_PORT", known.http_port, 1, 65535),
        network=_one_of(asked, "NETWORK", known.network, NETWORKS),
        data={key: value for key, value in known.data.items() if hosts_exist or key not in FOUND_OUT},
    )
    scheduler = _one_of(asked, "SCHEDULER", new.data.get("scheduler", ""), SCHEDULERS)
    if scheduler:
        new.data["scheduler"] = scheduler
    if hosts_exist:
        _refuse_to_change(known, new)
    return new


def _refuse_to_change(known: Settings, new: Settings) -> None:
    for name in ("workers", "proxies"):
        have, want = getattr(known, name), getattr(new, name)
        if want < have:
            raise LabError(
                f"{name.upper()}={want}: the lab has {have} and is never shrunk; `make down` first"
            )
    for name in ("provider", "http_port", "network"):
        have, want = getattr(known, name), getattr(new, name)
        if want != have:
            raise LabError(f"{name.upper()}={want}: the hosts were made with {have}; `make down` first")
    have, want = known.data.get("scheduler"), new.data.get("scheduler")
    if have and want != have:
        raise LabError(f"SCHEDULER={want}: the hosts run {have}; `make down` first")


def _number(asked: Mapping[str, str], name: str, known: int, least: int, most: int) -> int:
    text = asked.get(name) or str(known)
    if not text.isdecimal() or not least <= int(text) <= most:
        raise LabError(f"{name}={text}: choose a number from {least} to {most}")
    return int(text)


def _one_of(asked: Mapping[str, str], name: str, known: str, choices: tuple[str, ...]) -> str:
    value = asked.get(name) or known
    if value and value not in choices:
        raise LabError(f"{name}={value}: choose {' or '.join(choices)}")
    return value


if __name__ == "__main__":  # the Vagrantfile reads this
    print(json.dumps(asdict(load())))
