"""The app's own secrets: in no job, image, argument or log, but in its environment or a file of its own.

The knob app_secrets names them; their values are lines NAME=value of app.env in the secrets folder. What
they were when a version was released belongs to it, as its image does: a release that fails goes back to
the old ones, too.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets as random
from pathlib import Path
from typing import Any

from nomad import Nomad
from nomad.api.exceptions import URLNotFoundNomadException
from pyinfra.api import DeployError
from pyinfra.api.host import HostData

from tasks import secrets

SOURCE = "app.env"
FILE = "/secrets/app.env"  # in the container
AS = ("environment", "file")


def values(data: HostData) -> dict[str, str]:
    """Name -> value. Raises DeployError, in one line."""
    wanted = _names(data)
    if not wanted:
        return {}
    file = secrets.folder(data) / SOURCE
    found = _parse(file)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DeployError(f"app_secrets: {file} has no line {missing[0]}=...")
    return {name: found[name] for name in wanted}


def _names(data: HostData) -> list[str]:
    """From --data they come as one text, with commas."""
    named = data.app_secrets
    return named.split(",") if isinstance(named, str) and named else list(named)


def _parse(file: Path) -> dict[str, str]:
    """As `docker run --env-file` reads it: to the line's end, no quotes; # begins a comment line."""
    if not file.is_file():
        raise DeployError(f"app_secrets: {file} is missing; it needs a line NAME=value for each")
    if file.stat().st_mode & 0o077:
        raise DeployError(f"app_secrets: others can read {file}; chmod 600 {file}")
    lines = [line for line in file.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def as_file(data: HostData) -> bool:
    """Whether the app gets them as the file FILE, and not in its environment. Raises DeployError."""
    if data.app_secrets_as not in AS:
        raise DeployError(f"app_secrets_as={data.app_secrets_as}: choose {' or '.join(AS)}")
    return bool(data.app_secrets) and data.app_secrets_as == "file"


def environment(data: HostData) -> dict[str, str]:
    """Those that the app gets in its environment."""
    return {} if as_file(data) else values(data)


def text(data: HostData) -> str:
    """The content of the file."""
    return "".join(f"{name}={value}\n" for name, value in values(data).items())


def stamp(data: HostData) -> str:
    """Of these values: it tells whether they changed, and nothing else about them. "" without secrets."""
    if not data.app_secrets:
        return ""
    where = secrets.folder(data)
    secrets.make_once(where, {"salt-app": lambda: random.token_hex(32)})
    shape = json.dumps([as_file(data), sorted(values(data).items())])
    key = secrets.read(where, "salt-app").encode()
    return "s" + hmac.new(key, shape.encode(), hashlib.sha256).hexdigest()[:16]


# In Nomad


def store(api: Nomad, data: HostData) -> None:
    """Put them into the job's variable, beside those of the versions that Nomad remembers."""
    mine = stamp(data)
    if not mine:
        return
    path = variable(data)
    found = _variable(api, path)
    items = {name: text for name, text in found["Items"].items() if name in _in_use(api, data.app_name)}
    items[mine] = text(data) if as_file(data) else _quoted(data)
    if items != found["Items"]:
        payload = {"Path": path, "Items": items}
        api.variable.create_variable(path, payload, cas=found["ModifyIndex"])


def variable(data: HostData) -> str:
    """Its tasks may read it without a grant, since it has the job's name."""
    return f"nomad/jobs/{data.app_name}"


def _variable(api: Nomad, path: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = api.variable.get_variable(path)
    except URLNotFoundNomadException:
        return {"Items": {}, "ModifyIndex": 0}
    return found


def _in_use(api: Nomad, job_id: str) -> set[str]:
    try:
        versions = api.job.get_versions(job_id)["Versions"]
    except URLNotFoundNomadException:
        return set()
    return {(version["Meta"] or {}).get("secrets", "") for version in versions}


def _quoted(data: HostData) -> str:
    """As Nomad's templates with `env = true` read them."""
    return "".join(f"{name}={json.dumps(value)}\n" for name, value in values(data).items())
