"""Nomad: a client on each worker, which is also a server where it is in group `servers`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import Any

import gevent  # type: ignore[import-untyped]
from nomad.api.exceptions import BaseNomadException
from pyinfra import host, inventory, logger
from pyinfra.api import FactBase, FunctionCommand, deploy, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State

from tasks import artifact, certificates, config, lock, nomad_acl, quorum, rolling, secrets, shell
from tasks.cluster import Unavailable, consul_api, nomad_api, wait_until
from tasks.consul import passing_checks, still_failing

CONFIG = "/etc/nomad.d/nomad.hcl"
CERT, KEY = "/etc/nomad.d/nomad.pem", "/etc/nomad.d/nomad.key"
UNIT = "/etc/systemd/system/nomad.service"
# Apart, since a change of it needs no restart: the key ring that a server keeps goes before it.
GOSSIP = "/etc/nomad.d/gossip.hcl"
FILES = [CONFIG, UNIT, "/usr/local/bin/nomad"]
JOIN_S = 4.0  # an election takes 1.5 s on the lab, a registration 0.2 s


@deploy("Nomad")
def install() -> None:
    artifact.install(name="Install Nomad", tool="nomad", version=host.data.nomad_version)
    config.write(
        name="Configure Nomad",
        files=[
            config.File(CONFIG, _configuration(), mode="600"),
            config.File(UNIT, config.render("nomad/nomad.service")),
            *(_secret_files() if host.data.secure else []),
        ],
    )


def _configuration() -> str:
    where, secure = secrets.folder(host.data), host.data.secure
    return config.render(
        "nomad/nomad.hcl.j2",
        is_server="servers" in host.groups,
        servers=[member.data.address for member in inventory.get_group("servers")],
        ca=certificates.CA_FILE,
        cert=CERT,
        key=KEY,
        consul_token=secure and secrets.token(where, "consul-nomad"),
    )


def _secret_files() -> list[config.File]:
    pair = certificates.certificate(host, "nomad")
    files = {CERT: pair.pem, KEY: pair.key}
    if "servers" in host.groups:
        key = secrets.gossip_key(secrets.folder(host.data), "nomad")
        files[GOSSIP] = f'server {{ encrypt = "{key}" }}\n'
    return [config.File(path, text, mode="600") for path, text in files.items()]


@deploy("Nomad")
def start() -> None:
    """Start what is stopped on all hosts at once: a first start, or a repair. Needs no gate."""
    rolling.start_if_stopped(
        name="Start Nomad where it is stopped, show it new certificates",
        unit="nomad",
        files=FILES,
        reload=[CERT, KEY, certificates.CA_FILE] if host.data.secure else [],
    )


@deploy("Nomad")
def roll() -> None:
    """One host at a time for what runs with an older binary or configuration, the leader last."""
    if not rolling.leads("workers"):
        return
    if host.data.secure and nomad_acl.missing(host.data):
        # Before the first roll, whose gates ask what takes TLS and a token.
        encrypt_together(name="Restart together what runs without encryption")
        give_rights(name="Make Nomad's tokens")
    rolling.roll(name="Restart Nomad where it is stale, one host at a time", service=SERVICE)
    if host.data.secure:
        give_rights(name="Give each token in Nomad its rights")
    join(name="Wait until Nomad has a leader and its clients are ready")
    rolling.change_by_api(
        name="Let Nomad's autopilot keep as many servers as there are",
        differs=_other_min_quorum,
        change=_set_min_quorum,
    )


class Plain(FactBase[bool]):
    """Whether the agent on this host answers without TLS; one with TLS says 400 to that."""

    def command(self, address: str, port: int) -> str:
        ask = f"exec 3<>/dev/tcp/{address}/{port} && printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3 && head -n 1 <&3"
        return f'timeout 5 bash -c "{ask}" 2>/dev/null || true'

    def process(self, output: Iterable[str]) -> bool:
        line = "".join(output)
        return bool(line) and " 400 " not in line


@operation()
def encrypt_together() -> Generator[FunctionCommand]:
    """Nomad encrypts its gossip with no way between off and on: servers that do do not hear those that do
    not. So its agents restart together, once; the containers and what they serve go on meanwhile."""
    plain = [member for member in rolling.members("workers") if _plain(member)]
    if not plain:
        host.noop("what runs is encrypted")
        return
    yield FunctionCommand(_restart_together, (plain,), {})


def _plain(member: Host) -> bool:
    data = member.data
    found: bool = member.get_fact(Plain, address=data.nomad_http_address, port=data.nomad_http_port)
    return found


def _restart_together(state: State, host: Host, members: list[Host]) -> bool:
    names = ", ".join(member.name for member in members)
    logger.warning(f"Nomad becomes encrypted: it restarts together on {names}, once; what it runs goes on")
    workers = rolling.members("workers")
    absent = ", ".join(worker.name for worker in inventory.get_group("workers") if worker not in workers)
    fault = lock.fault()
    if absent:
        fault = f"{absent}: not in this run, and could not talk to the others any more; take it in"
    if not fault:
        restarts = [gevent.spawn(rolling.run, member, "nomad") for member in members]
        gevent.joinall(restarts)
        fault = "; ".join(str(done.value) for done in restarts if done.value)
    if fault:
        logger.error(f"{host.print_prefix}Nomad: {fault}")
    return not fault


@operation()
def give_rights() -> Generator[FunctionCommand]:
    """Bootstrap Nomad's ACLs and write what differs, once there is a leader; no change when all is there."""
    if wait_until("", nomad_acl.differs, 0) is None:
        host.noop("every token has its rights")
        return
    yield FunctionCommand(_give_rights, (), {})


def _give_rights(state: State, host: Host) -> bool:
    """A new leader refuses for some moments; a wrong token is refused for ever."""
    answer: list[str | None] = []
    deadline_s = float(host.data.roll_deadline_s)
    silent = wait_until(
        "Nomad's first leader", lambda: answer.append(nomad_acl.grant()), deadline_s, logger.info
    )
    fault = f"{silent}; see journalctl -u nomad there" if silent else answer[0]
    if fault:
        logger.error(f"{host.print_prefix}Nomad: {fault}")
    return fault is None


def _other_min_quorum() -> str | None:
    """As in tasks/consul.py. python-nomad has no calls for autopilot, so its requester is used."""
    with nomad_api(host) as api:
        kept = api.operator.request("autopilot", "configuration", method="get").json()["MinQuorum"]
    return None if kept == len(inventory.get_group("servers")) else f"autopilot keeps {kept} servers"


def _set_min_quorum() -> None:
    with nomad_api(host) as api:
        settings = api.operator.request("autopilot", "configuration", method="get").json()
        settings["MinQuorum"] = len(inventory.get_group("servers"))
        cas = {"cas": settings["ModifyIndex"]}
        api.operator.request("autopilot", "configuration", method="put", json=settings, params=cas)


@operation()
def join() -> Generator[FunctionCommand]:
    """Wait until the client on each worker of this run is ready; no change when they are."""
    if wait_until("", _not_ready, 0) is None:
        host.noop("all clients are ready")
        return
    yield FunctionCommand(_join, (), {})


def _join(state: State, host: Host) -> bool:
    """A client that registers in the 0.1 s between the first election and the leader's keyring is
    refused, and tries again only after 15 to 30 s (measured; registerRetryIntv in Nomad's client.go).
    It has never registered, so nothing runs on it and a restart costs nothing: that makes it try now.
    """
    early = wait_until("Nomad's clients", _not_ready, JOIN_S, logger.info)
    while early and (refused := _never_registered()):  # asked anew: the others may have got in by themselves
        if not rolling.restart_each(state, host, SERVICE, refused[:1]):
            return False
    deadline_s = float(host.data.roll_deadline_s)
    fault = early and wait_until("Nomad's clients", _not_ready, deadline_s, logger.info)
    if fault:
        logger.error(f"{host.print_prefix}Nomad: {fault}; see journalctl -u nomad there")
    return fault is None


def _not_ready() -> str | None:
    """A node counts by its name; a node that is down but not in this run is not waited for."""
    ready = {node["Name"] for node in _nodes() if node["Status"] == "ready"}
    missing = [member.name for member in rolling.members("workers") if member.name not in ready]
    return f"clients not ready: {', '.join(missing)}" if missing else None


def _never_registered() -> list[Host]:
    try:
        known = {node["Name"] for node in _nodes()}
    except Unavailable:
        return []  # no leader yet: every client waits for one
    return [member for member in rolling.members("workers") if member.name not in known]


def _nodes() -> list[dict[str, Any]]:
    with nomad_api(host) as api:
        nodes: list[dict[str, Any]] = api.nodes.get_nodes()
        return nodes


def autopilot(member: Host) -> dict[str, Any]:
    """GET /v1/operator/autopilot/health, which python-nomad has no call for; 429 = unhealthy."""
    with nomad_api(member) as api:
        try:
            answer = api.operator.request("autopilot", "health", method="get")
        except BaseNomadException as error:
            if getattr(error.nomad_resp, "status_code", 0) != 429:
                raise
            answer = error.nomad_resp
        health: dict[str, Any] = answer.json()
        return health


def raft(member: Host) -> dict[str, str]:
    """What the server on `member` itself knows about its log."""
    with nomad_api(member) as api:
        statistics: dict[str, str] = api.agent.get_agent()["stats"]["raft"]
        return statistics


def _leader(member: Host) -> str:
    with nomad_api(member) as api:
        leader: str = api.status.leader.get_leader()
        return leader


QUORUM = quorum.Quorum(autopilot, raft, _leader)


def node(member: Host) -> dict[str, Any]:
    """The client on `member`, as Nomad's node list gives it; {} if it has never registered."""
    with nomad_api(member) as api:
        mine = [n for n in api.nodes.get_nodes() if n["Name"] == member.name]
        return max(mine, key=lambda n: int(n["Status"] == "ready"), default={})


def _recovery(member: Host) -> Callable[[], str | None]:
    """The client on this host is ready again, too, and so are the checks that Nomad has in Consul."""
    caught_up = QUORUM.recovery(member)
    passed = passing_checks(member)

    def check() -> str | None:
        unready = None if node(member).get("Status") == "ready" else "its client is not ready yet"
        return caught_up() or unready or still_failing(member, passed)

    return check


SERVICE = rolling.Service(
    unit="nomad",
    files=FILES,
    group="workers",
    rank=QUORUM.rank,
    gate=QUORUM.gate,
    recovery=_recovery,
)


# A new token in Consul (rotate.py)


@operation()
def take_consul_token() -> Generator[FunctionCommand]:
    """Nomad comes to Consul with its current token, one worker at a time; no change where it does."""
    if rolling.leaves_it_to_another():
        return
    which = [member for member in rolling.members("workers") if _stale(member) or _registered_before(member)]
    if not which:
        host.noop("Nomad's services are registered with its current token")
        return
    yield FunctionCommand(rolling.restart_each, (REGISTERS_ANEW, which), {})


def _stale(member: Host) -> bool:
    return bool(member.get_fact(rolling.UnitState, unit="nomad", files=FILES) == "stale")


def _registered_before(member: Host) -> bool:
    """Consul keeps with each service the token that registered it, and lets the check speak with that one.
    No API shows it, so we look where Consul keeps it; a shell's own words show no token to others."""
    token = secrets.token(secrets.folder(member.data), "consul-nomad")
    look = (
        'read -r token; for file in /var/lib/consul/services/*; do case "$(cat "$file")" in'
        ' *"$token"*) ;; *\'"ID":"_nomad-\'*) echo other ;; esac; done'
    )
    _, output = shell.run(member, look, _stdin=token)
    return "other" in output.stdout


def _register_anew(member: Host, unit: str) -> str | None:
    """Nomad registers what is missing, never what is there. Meanwhile the other workers are in HAProxy; it
    keeps its last servers if there are no others."""
    with consul_api(member) as api:
        for service in [name for name in api.agent.services() if name.startswith("_nomad-")]:
            api.agent.service.deregister(service)
    return rolling.run(member, unit)


def _registered_again(member: Host) -> Callable[[], str | None]:
    recovered = _recovery(member)
    before = set(passing_checks(member))

    def check() -> str | None:
        missing = before - set(passing_checks(member))
        return f"{len(missing)} checks are not registered yet" if missing else recovered()

    return check


REGISTERS_ANEW = replace(SERVICE, restart=_register_anew, recovery=_registered_again)
