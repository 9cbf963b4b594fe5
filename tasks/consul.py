"""Consul: a server on each host of group `servers`, a client elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import Any

from consul import ConsulException
from pyinfra import host, inventory, logger
from pyinfra.api import FunctionCommand, deploy, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State

from tasks import artifact, certificates, config, quorum, rolling, secrets
from tasks.cluster import Unavailable, consul_api, wait_until

CONFIG = "/etc/consul.d/consul.hcl"
SECRETS = "/etc/consul.d/secrets.hcl"
CERTIFICATE, KEY = "/etc/consul.d/tls/consul.pem", "/etc/consul.d/tls/consul.key"
UNIT = "/etc/systemd/system/consul.service"
FILES = [CONFIG, UNIT, "/usr/local/bin/consul"]
READ_ON_RELOAD = [SECRETS, CERTIFICATE, KEY, certificates.CA_FILE]
OWNER = "consul:consul"


@deploy("Consul")
def install() -> None:
    config.create_user(name="Create Consul's user", user="consul")
    artifact.install(name="Install Consul", tool="consul", version=host.data.consul_version)
    text = config.render(
        "consul/consul.hcl.j2",
        is_server="servers" in host.groups,
        servers=[member.data.address for member in inventory.get_group("servers")],
        ca_file=certificates.CA_FILE,
        cert_file=CERTIFICATE,
        key_file=KEY,
    )
    config.write(
        name="Configure Consul",
        files=[
            config.File(CONFIG, text, mode="640", owner=OWNER),
            config.File(UNIT, config.render("consul/consul.service")),
            *(_secret_files() if host.data.secure else []),
        ],
    )


@deploy("Consul")
def renew() -> None:
    """Give the agent its keys, tokens and certificates as they now are, and have it read them."""
    config.write(name="Write Consul's keys, tokens and certificates", files=_secret_files())
    start()


def _secret_files() -> list[config.File]:
    where, pair = secrets.folder(host.data), certificates.certificate(host, "consul")
    text = config.render(
        "consul/secrets.hcl.j2",
        gossip_key=secrets.gossip_key(where, "consul"),
        bootstrap_token=secrets.token(where, "consul-bootstrap") if "servers" in host.groups else "",
        agent_token=secrets.agent_token(where, host.name),
        default_token=secrets.token(where, "consul-dns"),
    )
    files = {SECRETS: text, CERTIFICATE: pair.pem, KEY: pair.key}
    return [config.File(path, content, mode="600", owner=OWNER) for path, content in files.items()]


@deploy("Consul")
def start() -> None:
    """Start what is stopped on all hosts at once: a first start, or a repair. Needs no gate."""
    rolling.start_if_stopped(
        name="Start Consul where it is stopped, show it new certificates and tokens",
        unit="consul",
        files=FILES,
        reload=READ_ON_RELOAD if host.data.secure else [],
    )


@deploy("Consul")
def roll() -> None:
    """One host at a time for what runs with an older binary or configuration, the leader last."""
    if not rolling.driver():
        return
    rolling.roll(name="Restart Consul where it is stale, one host at a time", service=SERVICE)
    rolling.wait_until_healthy(
        name="Wait until Consul has a leader", what="a Consul leader", fault=_leaderless
    )
    rolling.change_by_api(
        name="Let Consul's autopilot keep as many servers as there are",
        differs=_other_min_quorum,
        change=_set_min_quorum,
    )


def _other_min_quorum() -> str | None:
    """The configuration file's value is read at the first election only; later ones go by the API."""
    with consul_api(host) as api:
        kept = api.operator.autopilot.configuration()["MinQuorum"]
    return None if kept == len(inventory.get_group("servers")) else f"autopilot keeps {kept} servers"


def _set_min_quorum() -> None:
    with consul_api(host) as api:
        settings = api.operator.autopilot.configuration()
        # The index that was read guards against another writer.
        index = settings.pop("ModifyIndex")
        settings.pop("CreateIndex")
        settings["MinQuorum"] = len(inventory.get_group("servers"))
        api.operator.autopilot.update(settings, cas=index)


def _leaderless() -> str | None:
    with consul_api(host) as api:
        return None if api.status.leader() else "no leader yet"


def autopilot(member: Host) -> dict[str, Any]:
    """GET /v1/operator/autopilot/health. Not python-consul2's own call: it raises on the 429 that an
    unhealthy cluster answers with, and the body is what we want then."""
    with consul_api(member) as api:
        health: dict[str, Any] = api.http.get(
            lambda answer: json.loads(answer.body), path="/v1/operator/autopilot/health"
        )
        return health


def raft(member: Host) -> dict[str, str]:
    """What the server on `member` itself knows about its log."""
    with consul_api(member) as api:
        statistics: dict[str, str] = api.agent.self()["Stats"]["raft"]
        return statistics


def _leader(member: Host) -> str:
    with consul_api(member) as api:
        leader: str = api.status.leader()
        return leader


QUORUM = quorum.Quorum(autopilot, raft, _leader)


def _gate(member: Host) -> str | None:
    return QUORUM.gate(member) or (None if member.data.accept_outage else _unchecked(member))


def _unchecked(member: Host) -> str | None:
    """A run cut off after a restart did not wait for the checks there: they have no output yet."""
    with consul_api(member) as api:
        unchecked = {c["Node"] for c in api.health.state("critical")[1] if not c["Output"]}
    names = ", ".join(m.name for m in rolling.members("") if m.name in unchecked)
    return f"checks have not run yet since Consul's restart on {names}" if names else None


def _checks(member: Host) -> dict[str, tuple[str, bool]]:
    """Check id -> its name and whether it passes, in the catalog and as its agent has it, for this node.

    For half a second a restarted agent's checks still pass in the catalog: only the agent knows better.
    """
    with consul_api(member) as api:
        agent = {c["CheckID"]: c["Status"] for c in api.agent.checks().values()}
        catalog = api.health.node(member.name)[1]
    return {
        c["CheckID"]: (c["Name"], agent.get(c["CheckID"], c["Status"]) == c["Status"] == "passing")
        for c in catalog
    }


def passing_checks(member: Host) -> set[str]:
    """The ids of the checks on this node that pass."""
    return {check for check, (_, ok) in _checks(member).items() if ok}


def still_failing(member: Host, passed: set[str]) -> str | None:
    """The names of the checks that passed before a restart and do not pass again."""
    failing = [name for check, (name, ok) in _checks(member).items() if not ok and check in passed]
    return f"checks not passing yet: {', '.join(failing)}" if failing else None


def _recovery(member: Host) -> Callable[[], str | None]:
    """The next host waits for its checks, too: a restarted agent brings them back as critical, and three
    quick restarts would empty HAProxy's backends."""
    caught_up = QUORUM.recovery(member)
    passed = set() if QUORUM.sick(member) else passing_checks(member)
    return lambda: caught_up() or still_failing(member, passed)


SERVICE = rolling.Service(unit="consul", files=FILES, rank=QUORUM.rank, gate=_gate, recovery=_recovery)


# The gossip key's rotation, with the keyring API: python-consul2 has no calls for it.

KEYRING = "/v1/operator/keyring"
KEYRING_S = 30


@operation()
def use_next_gossip_key() -> Generator[FunctionCommand]:
    """Every member learns the next key, then all encrypt with it; they still understand the one before."""
    if rolling.leaves_it_to_another():
        return
    yield FunctionCommand(_use_next_gossip_key, (), {})


def _use_next_gossip_key(state: State, host: Host) -> bool:
    key = secrets.gossip_key(secrets.folder(host.data), "consul")
    return _keyring(host, "post", key, "Keys") and _keyring(host, "put", key, "PrimaryKeys")


@operation()
def forget_old_gossip_keys() -> Generator[FunctionCommand]:
    """Then the next key becomes the current one."""
    if rolling.leaves_it_to_another():
        return
    yield FunctionCommand(_forget_old_gossip_keys, (), {})


def _forget_old_gossip_keys(state: State, host: Host) -> bool:
    where = secrets.folder(host.data)
    key = secrets.gossip_key(where, "consul")
    try:
        old = {one for ring in _rings(host) for one in ring["Keys"]} - {key}
    except Unavailable as error:
        return _failed(host, f"{error or type(error).__name__}")
    done = all(_keyring(host, "delete", one) for one in old)
    if done:
        secrets.finish(where, ["gossip-consul"])
    return done


def _keyring(host: Host, method: str, key: str, known_as: str = "") -> bool:
    """Change the key ring of all members, and see that each of them has done so."""
    try:
        with consul_api(host) as api:
            # Consul answers 500 and says why when one member does not follow.
            getattr(api.http, method)(_raise_unless_ok, path=KEYRING, data=json.dumps({"Key": key}))
        fault = wait_until(
            "all members", lambda: _unaware(host, key, known_as) if known_as else None, KEYRING_S
        )
    except Unavailable as error:
        fault = f"{error or type(error).__name__}"
    return _failed(host, fault) if fault else True


def _raise_unless_ok(answer: Any) -> None:  # noqa: ANN401 - python-consul2's own
    if answer.code != 200:
        raise ConsulException(answer.body)


def _unaware(host: Host, key: str, known_as: str) -> str | None:
    """How many members do not have the key; known_as: Keys or PrimaryKeys."""
    left = sum(ring["NumNodes"] - ring[known_as].get(key, 0) for ring in _rings(host))
    return f"{left} without the next gossip key" if left else None


def _rings(host: Host) -> list[dict[str, Any]]:
    """One of the LAN, one of the servers' WAN pool."""
    with consul_api(host) as api:
        rings: list[dict[str, Any]] = api.http.get(lambda answer: json.loads(answer.body), path=KEYRING)
        return rings


def _failed(host: Host, fault: str) -> bool:
    logger.error(f"{host.print_prefix}Consul's key ring: {fault}; repair that and run rotate.py again")
    return False
