"""What each token may do in Consul: a policy of its own for each, and for each agent its node identity.

The servers know the bootstrap token from their configuration and make it when they elect their first
leader. All else is made with it, through the API, and compared on each run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gevent  # type: ignore[import-untyped]
from consul import Consul
from consul.base import ACLPermissionDenied
from pyinfra import host, inventory, logger
from pyinfra.api import FunctionCommand, deploy, operation
from pyinfra.api.host import Host, HostData
from pyinfra.api.state import State

from tasks import rolling, secrets
from tasks.cluster import Unavailable, consul_api, wait_until

PREFIX = "hashistack-"  # of our policies' names


def _rules(**resources: dict[str, str]) -> str:
    """Consul's rules: resource -> its name -> read or write. operator and the like have no names."""
    return "\n".join(
        f'{resource} "{name}" {{ policy = "{policy}" }}'
        for resource, names in resources.items()
        for name, policy in names.items()
    )


def policies(data: HostData) -> dict[str, str]:
    """Token -> its rules. What a run of ours does is with one of the last three, see cluster.act_as."""
    ours = {data.app_name: "read", "registry": "read"}
    catalogue = {"node_prefix": {"": "read"}, "service_prefix": {"": "read"}}
    records = "hashistack/release/"
    return {
        # The agents' default: what DNS and a local request without a token may do.
        "dns": _rules(**catalogue, query_prefix={"": "read"}),
        "template": _rules(node_prefix={"": "read"}, service={data.app_name: "read"}),
        "nomad": _rules(
            agent_prefix={"": "read"},
            node_prefix={"": "read"},
            service_prefix={"nomad": "write"},
            service=dict.fromkeys(ours, "write"),
        ),
        # The docker scheduler's service files.
        "registration": _rules(service=dict.fromkeys(ours, "write")),
        "release": _rules(
            agent_prefix={"": "read"},
            node_prefix={"": "read"},
            service=ours,
            session_prefix={"": "write"},
            key_prefix={records: "write"},
        ),
        "status": _rules(**catalogue, agent_prefix={"": "read"}, key_prefix={records: "read"})
        + '\noperator = "read"',
    }


@dataclass(frozen=True)
class Token:
    """One that the cluster shall know. grants: a policy or a node identity, as PUT /v1/acl/token takes it."""

    secret: str
    name: str
    grants: dict[str, Any]

    def payload(self) -> dict[str, Any]:
        """The body of PUT /v1/acl/token."""
        return {"SecretID": self.secret, "Description": f"{PREFIX}{self.name}", **self.grants}


def tokens(data: HostData) -> list[Token]:
    """All that the cluster shall know."""
    where = secrets.folder(data)
    return [
        _with_policy(where, "bootstrap", "global-management"),
        *(_with_policy(where, name, f"{PREFIX}{name}") for name in policies(data)),
        *(_of_agent(where, member) for member in inventory),
    ]


def _with_policy(where: Path, name: str, policy: str) -> Token:
    return Token(secrets.token(where, f"consul-{name}"), name, {"Policies": [{"Name": policy}]})


def _of_agent(where: Path, member: Host) -> Token:
    """Its node identity: it may register itself under its own name, and read the catalogue."""
    identity = {"NodeName": member.name, "Datacenter": member.data.consul_datacenter}
    return Token(secrets.agent_token(where, member.name), member.name, {"NodeIdentities": [identity]})


@deploy("Consul")
def grant() -> None:
    """Once the first leader is there; before anybody comes with one of these tokens."""
    write_tokens(name="Give each token in Consul its rights")


@operation()
def write_tokens() -> Generator[FunctionCommand]:
    """Write the policies and tokens that are missing or differ; one host does it for the cluster."""
    if rolling.leaves_it_to_another():
        return
    if wait_until("", _differs, 0) is None:
        host.noop("every token has its rights")
        return
    yield FunctionCommand(_write, (), {})


def _differs() -> str | None:
    with consul_api(host) as api:
        return f"{len(changes)} to write" if (changes := _changes(api, host.data)) else None


def _write(state: State, host: Host) -> bool:
    deadline_s = float(host.data.roll_deadline_s)
    fault = wait_until("Consul's first leader", _not_bootstrapped, deadline_s, logger.info)
    try:
        if fault is None:
            with consul_api(host) as api:
                for change in _changes(api, host.data):
                    change()
            _wake_agents()
    except Unavailable as error:
        fault = f"{error or type(error).__name__}"
    if fault:
        logger.error(f"{host.print_prefix}Consul: {fault}; run deploy.py again")
    return fault is None


def _not_bootstrapped() -> str | None:
    try:
        with consul_api(host) as api:
            api.acl.tokens.self()
    except ACLPermissionDenied:
        return secrets.refused("consul-bootstrap")
    return None


def _changes(api: Consul, data: HostData) -> list[Callable[[], object]]:
    """What is still to be done, in order: a token needs its policy."""
    ids = {policy["Name"]: policy["ID"] for policy in api.acl.policy.list()}
    known = {token["SecretID"] for token in api.acl.tokens.list()}
    changes: list[Callable[[], object]] = []
    for name, rules in policies(data).items():
        policy = f"{PREFIX}{name}"
        if policy not in ids:
            changes.append(partial(api.acl.policy.create, policy, rules=rules))
        elif api.acl.policy.get(ids[policy])["Rules"] != rules:
            changes.append(partial(api.acl.policy.update, ids[policy], policy, rules=rules))
    for token in tokens(data):
        if token.secret not in known:
            changes.append(partial(api.acl.tokens.create, token.payload()))
    return changes


def _wake_agents() -> None:
    """An agent whose token was refused tries again only after 15 to 30 s (retryFailInterval in Consul's
    ae.go). One that is given its token by the API does so at once."""
    members = rolling.members("")
    gevent.joinall([gevent.spawn(_wake, member) for member in members])


def _wake(member: Host) -> None:
    token = secrets.agent_token(secrets.folder(member.data), member.name)
    with suppress(*Unavailable), consul_api(member) as api:
        # python-consul2 has no call for it.
        body = json.dumps({"Token": token})
        api.http.put(lambda answer: answer, path="/v1/agent/token/agent", data=body)


# The end of a rotation


@operation()
def forget_old_tokens() -> Generator[FunctionCommand]:
    """Delete what is not to be known any more: when every host has the next ones. One host does it."""
    if rolling.leaves_it_to_another():
        return
    yield FunctionCommand(_forget, (), {})


def _forget(state: State, host: Host) -> bool:
    """Resumable: the next bootstrap token becomes the current one when nothing is left to be done."""
    where = secrets.folder(host.data)
    wanted = {token.secret for token in tokens(host.data)}
    try:
        with consul_api(host, secrets.token(where, "consul-bootstrap")) as api:
            for token in api.acl.tokens.list():
                if _ours(token["Description"]) and token["SecretID"] not in wanted:
                    api.acl.tokens.delete(token["AccessorID"])
    except Unavailable as error:
        logger.error(f"{host.print_prefix}Consul: {error or type(error).__name__}; run rotate.py again")
        return False
    secrets.finish(where, [name for name in secrets.WANTED if name.startswith("token-consul-")])
    return True


def _ours(description: str) -> bool:
    return description.startswith(PREFIX) or description == "Initial Management Token"
