"""The inventory's hosts as testinfra names them, reached with the SSH settings that pyinfra uses."""

from typing import Any

import inventory
from lab import settings

_SSH_CONFIG = settings.ROOT / ".vagrant" / "testinfra-ssh-config"
_OPTIONS = {
    "ssh_hostname": "HostName",
    "ssh_user": "User",
    "ssh_key": "IdentityFile",
    "ssh_known_hosts_file": "UserKnownHostsFile",
}


def urls(group: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """One URL a host, such as ssh://worker-01?..., for a module's `testinfra_hosts`."""
    return [f"ssh://{name}?sudo=true&ssh_config={_ssh_config(data)}" for name, data in group]


def _ssh_config(data: dict[str, Any]) -> str:
    """Vagrant's own file where there is one, else one made from the inventory."""
    if "ssh_config_file" in data:
        return str(data["ssh_config_file"])
    lines = ["Host *", "  StrictHostKeyChecking accept-new"]
    for name, host in inventory.workers + inventory.proxies:
        lines += [f"Host {name}"]
        lines += [f"  {option} {host[key]}" for key, option in _OPTIONS.items() if key in host]
    _SSH_CONFIG.parent.mkdir(exist_ok=True)
    _SSH_CONFIG.write_text("\n".join(lines) + "\n")
    return str(_SSH_CONFIG)
