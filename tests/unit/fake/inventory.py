"""The lab's shape on the @fake connector (see world.py)."""

from typing import Any

from tests.unit.fake import world


def _host(name: str, address: str) -> tuple[str, dict[str, Any]]:
    # Images of ours would have to be in the cache of whoever runs the tests.
    images = {"registry_image": "registry:2", "app_base_image": "debian:12"}
    return f"@fake/{name}", {"address": address, "secrets_folder": str(world.FOLDER / "secrets"), **images}


workers = [
    _host(f"worker-{n:02d}", f"192.168.56.{10 + n}") for n in range(1, world.load().get("workers", 3) + 1)
]
servers = workers[: world.load().get("servers", 3)]
builder = workers[2:3]
_vip = world.load().get("vip", "")
proxies = [
    (name, {**data, "haproxy_vip": _vip})
    for name, data in (_host("proxy-01", "192.168.56.21"), _host("proxy-02", "192.168.56.22"))
    if _vip or name == "@fake/proxy-01"
]
proxies += map(tuple, world.load().get("unreachable", []))
