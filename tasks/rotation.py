"""rotate.py's steps: a key, token or CA is replaced on a running cluster with an overlap of both.

Nothing is refused meanwhile, since everybody knows the next one before anybody uses it, and nobody uses
the one before when it is forgotten. Each step may be done again, so a run that was cut off is ended by
the next one; until then deploy.py is refused.
"""

from __future__ import annotations

from collections.abc import Generator

from pyinfra import host, inventory, state
from pyinfra.api import DeployError, operation

from tasks import (
    acl,
    base,
    certificates,
    consul,
    containers,
    haproxy,
    nomad,
    nomad_acl,
    nomad_keyring,
    registry,
    rolling,
    secrets,
)

CONSUL_TOKENS = [name for name in secrets.WANTED if name.startswith("token-consul-")]


def wanted() -> str:
    """What to rotate, from `--data what=`. Who is not there would be locked out: all hosts must be."""
    what = host.data.get("what")
    if what not in ("gossip", "tokens", "ca"):
        raise DeployError(f"what={what}: choose gossip, tokens or ca")
    if not host.data.secure:
        raise DeployError("secure = False: there is nothing to rotate")
    absent = sorted(one.name for one in inventory if one not in state.active_hosts)
    if absent:
        raise DeployError(f"{', '.join(absent)}: not in this run, and would be locked out; repair it first")
    return str(what)


def begin(what: str) -> None:
    """Make the next ones on the controller, where that is not done yet."""
    where = secrets.folder(host.data)
    if what == "ca":
        certificates.begin_rotation(where)
    else:
        secrets.begin(where, _gossip_keys() if what == "gossip" else CONSUL_TOKENS)


def _gossip_keys() -> list[str]:
    return ["gossip-consul", nomad_keyring.FILE] if host.data.scheduler == "nomad" else ["gossip-consul"]


def gossip() -> None:
    """The key ring of the running members first; the files serve who joins later."""
    by_nomad = host.data.scheduler == "nomad"
    leads_nomad = by_nomad and rolling.leads("workers")
    consul.use_next_gossip_key(name="Let every member of Consul use the next gossip key")
    if leads_nomad:
        nomad_keyring.use_next_gossip_key(name="Let every server of Nomad use the next gossip key")
    consul.renew()
    if "workers" in host.groups and by_nomad:
        nomad.install()
    consul.forget_old_gossip_keys(name="Let Consul forget the gossip key before")
    if leads_nomad:
        nomad_keyring.forget_old_gossip_keys(name="Let Nomad forget the gossip key before")


def tokens() -> None:
    """Both are known to Consul until every host has the next ones."""
    acl.write_tokens(name="Let Consul know the next tokens")
    consul.renew()
    by_nomad = host.data.scheduler == "nomad"
    if "workers" in host.groups and by_nomad:
        nomad.install()
    if by_nomad:
        nomad.take_consul_token(name="Let Nomad register its services with the next token")
    if "workers" in host.groups and not by_nomad:
        containers.run_registry()
        containers.renew_service_file(name="Give Consul what serves with the next token")
    if "proxies" in host.groups:
        haproxy.install()
    haproxy.roll()
    if by_nomad and rolling.leads("workers"):
        nomad_acl.replace_tokens(name="Replace Nomad's tokens")
    acl.forget_old_tokens(name="Let Consul forget the tokens before")


def ca() -> None:
    """Trust both, use the next, trust the next alone: a barrier after each, as pyinfra has it."""
    where = secrets.folder(host.data)
    is_worker = "workers" in host.groups
    base.trust(certificates.ca(where))
    if is_worker:
        registry.trust(certificates.ca(where))
    _read_again()
    finish(name="Sign with the next CA from here on", file="ca.key")
    consul.renew()
    if is_worker and host.data.scheduler == "nomad":
        nomad.install()
    _read_again()
    if is_worker:
        registry.configure()
        registry.run()
    if "proxies" in host.groups:
        haproxy.install()
    haproxy.roll()
    base.trust(certificates.next_ca(where))
    if is_worker:
        registry.trust(certificates.next_ca(where))
    _read_again()
    finish(name="Trust the next CA alone", file="ca.pem")


def _read_again() -> None:
    consul.start()
    if "workers" in host.groups and host.data.scheduler == "nomad":
        nomad.start()


@operation()
def finish(file: str) -> Generator[str]:
    """The next ca.key, or ca.pem, becomes the current one on the controller: all hosts are ready for it."""
    if state.is_executing:
        secrets.finish(secrets.folder(host.data), [file])
        host.noop("done on the controller")
    yield from ()


STEPS = {"gossip": gossip, "tokens": tokens, "ca": ca}
