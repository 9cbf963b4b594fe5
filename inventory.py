"""The hosts and their groups; nothing else knows a host name.

These are the lab's hosts. For machines of your own, write a file like this and nothing more:

    workers = [
        ("app-1", {"address": "10.0.0.11", "ssh_hostname": "app-1.example.com", "ssh_user": "admin"}),
        ("app-2", {"address": "10.0.0.12", "ssh_hostname": "app-2.example.com", "ssh_user": "admin"}),
        ("app-3", {"address": "10.0.0.13", "ssh_hostname": "app-3.example.com", "ssh_user": "admin"}),
    ]
    servers = workers          # 3 or 5 of the workers
    builder = workers[2:3]     # builds the app's image
    proxies = [("lb-1", {"address": "10.0.0.21", "ssh_hostname": "lb-1.example.com"})]

`address` is the host's address on the private network that joins them. Two proxies share a third one
there, which clients use: `haproxy_vip`, here or in group_data.
"""

import json
from pathlib import Path
from typing import Any

from lab import settings

_lab = settings.load()
_ssh_config = settings.ROOT / ".vagrant" / "ssh-config"


def _host(name: str, address: str, **data: str) -> tuple[str, dict[str, Any]]:
    """A lab host: reached at its private address or, where that is not reachable, as Vagrant says."""
    ssh: dict[str, Any] = {
        "ssh_known_hosts_file": str(settings.ROOT / ".vagrant" / "known_hosts"),
        "secrets_folder": str(settings.SECRETS),
    }
    if _ssh_config.exists():
        ssh |= {"ssh_config_file": str(_ssh_config)}
    else:
        key = f".vagrant/machines/{name}/{_lab.provider}/private_key"
        ssh |= {
            "ssh_hostname": address,
            "ssh_user": "vagrant",
            "ssh_key": str(settings.ROOT / Path(key)),
        }
    return name, {"address": address, **ssh, **data, **_lab.data}


workers = [_host(f"worker-{n:02d}", f"{_lab.network}.{10 + n}") for n in range(1, _lab.workers + 1)]
servers = workers[: 5 if _lab.workers >= 5 else 3]
builder = workers[2:3]
_vip = {"haproxy_vip": f"{_lab.network}.20" if _lab.proxies > 1 else ""}
proxies = [_host(f"proxy-{n:02d}", f"{_lab.network}.{20 + n}", **_vip) for n in range(1, _lab.proxies + 1)]

if __name__ == "__main__":  # the Vagrantfile reads this
    print(json.dumps({name: data["address"] for name, data in workers + proxies}))
