"""What each token may do in Nomad: one for deploy.py, for releases, and for status.py.

The bootstrap token is ours, made before Nomad knows it. The others are made by Nomad, since it takes
no others from outside; they are kept beside ours, and asked for again by their names if lost.
"""

from __future__ import annotations

from collections.abc import Generator

from nomad import Nomad
from nomad.api.exceptions import (
    BaseNomadException,
    URLNotAuthorizedNomadException,
    URLNotFoundNomadException,
)
from pyinfra import host, logger
from pyinfra.api import FunctionCommand, operation
from pyinfra.api.host import Host, HostData
from pyinfra.api.state import State

from tasks import secrets
from tasks.cluster import Unavailable, nomad_api

# Nomad's own services that are not the app: the release token has no rights there.
PLATFORM = "platform"

PREFIX = "hashistack-"  # of our tokens' and policies' names
BOOTSTRAP = "Bootstrap Token"  # Nomad's own name for it
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
                'agent { policy = "read" }',
                *(f'{what} {{ policy = "write" }}' for what in ("node", "operator")),
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
        wanted = policies(host.data)
        known = {token["Name"] for token in api.acl.get_tokens()}
        wrong = [name for name in wanted if _rules(api, name) != wanted[name] or PREFIX + name not in known]
    return f"{', '.join(wrong)}: to be written" if wrong else None


def _rules(api: Nomad, name: str) -> str | None:
    try:
        rules: str = api.acl.get_policy(PREFIX + name)["Rules"]
    except URLNotFoundNomadException:
        return None
    return rules


def grant() -> str | None:
    """Bootstrap if that was never done; write what differs. What is wrong, or None."""
    with nomad_api(host, "bootstrap") as api:
        if not _known(api) and (refused := _bootstrap(api)):
            return refused
        for name, rules in policies(host.data).items():
            if _rules(api, name) != rules:
                api.acl.create_policy(PREFIX + name, {"Name": PREFIX + name, "Rules": rules})
            _keep(name, _token(api, name))
    return None


def _known(api: Nomad) -> bool:
    try:
        api.acl.get_self_token()
    except URLNotAuthorizedNomadException:
        return False
    return True


def _bootstrap(api: Nomad) -> str | None:
    """With our own secret: a run cut off right after it does not lose it."""
    secret = secrets.own_token(secrets.folder(host.data), "nomad-bootstrap")
    try:
        api.acl.request("bootstrap", json={"BootstrapSecret": secret}, method="post")
    except BaseNomadException as error:
        if "already done" not in str(getattr(error.nomad_resp, "text", "")):
            raise
        return secrets.refused("nomad-bootstrap")
    return None


def _token(api: Nomad, name: str) -> str:
    """The secret of the token of this name, made if there is none: a run cut off here leaves no second."""
    for token in api.acl.get_tokens():
        if token["Name"] == PREFIX + name:
            return str(api.acl.get_token(token["AccessorID"])["SecretID"])
    return _new(api, name)


def _new(api: Nomad, name: str) -> str:
    body = {"Name": PREFIX + name, "Type": "client", "Policies": [PREFIX + name]}
    if name == "bootstrap":
        body = {"Name": BOOTSTRAP, "Type": "management"}
    return str(api.acl.create_token(body)["SecretID"])


def _keep(name: str, secret: str) -> None:
    where = secrets.folder(host.data)
    file = where / _file(name)
    if not file.exists() or file.read_text().strip() != secret:
        secrets.write(where, file.name, secret)


# rotate.py: only the controller has these tokens, so each is replaced there and then forgotten by Nomad


@operation()
def replace_tokens() -> Generator[FunctionCommand]:
    """Make new tokens, then delete the ones before. Done again after an interruption, one of each is left."""
    yield FunctionCommand(_replace_tokens, (), {})


def _replace_tokens(state: State, host: Host) -> bool:
    try:
        for name in [*policies(host.data), "bootstrap"]:
            _replace(host, name)
    except Unavailable as error:
        logger.error(
            f"{host.print_prefix}Nomad's tokens: {error or type(error).__name__}; run rotate.py again"
        )
        return False
    return True


def _replace(host: Host, name: str) -> None:
    with nomad_api(host, "bootstrap") as api:
        secret = _new(api, name)
    _keep(name, secret)
    title = BOOTSTRAP if name == "bootstrap" else PREFIX + name
    with nomad_api(host, "bootstrap") as api:  # with the new one, where that is replaced
        for token in api.acl.get_tokens():
            accessor = token["AccessorID"]
            if token["Name"] == title and api.acl.get_token(accessor)["SecretID"] != secret:
                api.acl.delete_token(accessor)
