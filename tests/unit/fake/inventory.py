"""The lab's shape on the @fake connector (see world.py)."""

from tests.unit.fake import world

workers = [f"@fake/worker-{n:02d}" for n in range(1, world.load().get("workers", 3) + 1)]
servers = workers[: world.load().get("servers", 3)]
builder = workers[2:3]
proxies = ["@fake/proxy-01", *world.load().get("more proxies", [])]
