"""What each token may do in Nomad: one for deploy.py, for releases, and for status.py.

The bootstrap token is ours, made before Nomad knows it. The others are made by Nomad, since it takes
no others from outside; they are kept beside ours, and asked for again by their names if lost.
"""

from __future__ import annotations

from typing import Any

from nomad import Nomad
from nomad.api.exceptions import BaseNomadException, URLNotFoundNomadException
from pyinfra import host
from pyinfra.api.host import HostData

from tasks import secrets
from tasks.cluster import nomad_api

REFUSED = (
    "it refuses token-nomad-bootstrap of secrets_folder: the cluster was made with another one, restore that"
)
# Nomad's own services that are not the app: the release token has no rights there.
PLATFORM = "platform"

_JOBS = ["list-jobs", "parse-job", "read-job", "submit-job", "read-logs"]


def policies(data: HostData) -> dict[str, str]:
    """Token -> its rules. Neither may run a command in a container or read its files.

    Nomad grants jobs by namespace, not by name: the app's is `default`, the registry has its own. A job
    there gets no volume of a host, since that takes a grant as well.
    """
    return {
        "operator": "\n".join(
            [
                _namespace("default", _JOBS),
                _namespace(PLATFORM, _JOBS),
                'host_volume "registry" { policy = "write" }',
                'host_volume "registry-tls" { policy = "read" }',
                *(f'{what} {{ policy = "write" }}' for what in ("agent", "node", "operator")),
            ]
        ),
        "release": "\n".join(
            [
                _namespace("default", _JOBS, variable=f"nomad/jobs/{data.app_name}"),
                'node { policy = "read" }',
            ]
        ),
        "status": "\n".join(
            [
                _namespace("default", ["list-jobs", "read-job"]),
                *(f'{what} {{ policy = "read" }}' for what in ("agent", "node", "operator")),
            ]
        ),
    }


def _namespace(name: str, capabilities: list[str], variable: str = "") -> str:
    listed = ", ".join(f'"{capability}"' for capability in capabilities)
    grant = f' variables {{ path "{variable}" {{ capabilities = ["read", "write"] }} }}' if variable else ""
    return f'namespace "{name}" {{ capabilities = [{listed}]{grant} }}'


def missing(data: HostData) -> bool:
    """Whether a token was never made, or is not on this controller."""
    where = secrets.folder(data)
    return not all((where / _file(name)).exists() for name in policies(data))


def _file(name: str) -> str:
    return f"token-nomad-{name}"


def differs() -> str | None:
    """What is not as it should be: a few words, or None. Raises Unavailable where Nomad does not answer."""
    if missing(host.data):
        return "a token is to be made"
    with nomad_api(host, "bootstrap") as api:
        wrong = [name for name, rules in policies(host.data).items() if _rules(api, name) != rules]
        known = {token["Name"] for token in api.acl.get_tokens()}
        wrong += [name for name in policies(host.data) if name not in known]
    return f"{', '.join(wrong)}: to be written" if wrong else None


def _rules(api: Nomad, name: str) -> str | None:
    try:
        rules: str = api.acl.get_policy(name)["Rules"]
    except URLNotFoundNomadException:
        return None
    return rules


def grant() -> str | None:
    """Bootstrap if that was never done; write what differs. What is wrong, or None."""
    with nomad_api(host, "bootstrap") as api:
        if not _known(api):
            try:
                secret = secrets.token(secrets.folder(host.data), "nomad-bootstrap")
                api.acl.request("bootstrap", json={"BootstrapSecret": secret}, method="post")
            except BaseNomadException as error:
                if "already done" not in str(error.nomad_resp.text):
                    raise
                return REFUSED
        for name, rules in policies(host.data).items():
            if _rules(api, name) != rules:
                api.acl.create_policy(name, {"Name": name, "Rules": rules})
            _keep(name, _token(api, name))
    return None


def _known(api: Nomad) -> bool:
    try:
        api.acl.get_self_token()
    except BaseNomadException as error:
        if getattr(error.nomad_resp, "status_code", 0) != 403:
            raise
        return False
    return True


def _token(api: Nomad, name: str) -> str:
    """The secret of the token of this name, made if there is none: a run cut off here leaves no second."""
    found: dict[str, Any] | None = next((t for t in api.acl.get_tokens() if t["Name"] == name), None)
    if found:
        found = api.acl.get_token(found["AccessorID"])
    else:
        found = api.acl.create_token({"Name": name, "Type": "client", "Policies": [name]})
    return str(found["SecretID"])


def _keep(name: str, secret: str) -> None:
    where = secrets.folder(host.data)
    file = where / _file(name)
    if not file.exists() or file.read_text().strip() != secret:
        secrets.write(where, file.name, secret)
