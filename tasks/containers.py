"""The docker scheduler: the app's containers and the registry, run by pyinfra itself, without Nomad.

Each worker runs one instance of the app in one of two colours, each with a port of its own. A release
starts the other colour, waits until it is healthy, moves Consul over, drains the old one and stops it,
one worker after the other. What a container is stands in its labels, and what serves in Consul's
service file, so a run that was interrupted anywhere is finished by the next. The stopped container of
the version before stays: it holds that version's image and settings for the way back.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import gevent  # type: ignore[import-untyped]
from paramiko import SSHException
from pyinfra import host, logger
from pyinfra.api import DeployError, FactBase, FunctionCommand, StringCommand, deploy, operation
from pyinfra.api.host import Host, HostData
from pyinfra.api.state import State
from pyinfra.operations import systemd

from tasks import app_secrets, config, secrets, shell
from tasks.cluster import Unavailable, consul_api, wait_until

COLOURS = ("blue", "green")
SERVICE_FILE = "/etc/consul.d/app.json"
REGISTRY_FILE = "/etc/consul.d/registry.json"
DOCKER_UNIT = "/etc/systemd/system/docker.service.d/private-address.conf"
LABELS = ("app", "colour", "version", "digest", "settings")


class Failed(DeployError):
    """The release cannot go on: what happened on which worker, and the container's last log lines."""


class Lost(DeployError):
    """A worker that does not answer over SSH any more."""


@dataclass(frozen=True)
class Release:
    """What every worker shall run. digest: sha256:... of the image in the workers' registries."""

    version: str
    digest: str


@dataclass(frozen=True)
class Instance:
    """A container of the app, as `docker ps` and its labels describe it."""

    state: str  # Docker's: created, running, restarting, paused, exited, dead
    created: str  # "2026-11-25 00:56:54 +0000 UTC": sorts by time
    app: str
    colour: str
    version: str
    digest: str
    settings: str  # see settings_hash

    @property
    def name(self) -> str:
        """The name of the container, and its service's ID in Consul."""
        return f"{self.app}-{self.colour}"

    @property
    def up(self) -> bool:
        return self.state in ("running", "restarting", "paused")


@dataclass
class Outcome:
    """How a roll ended. fault: why it failed (None: it did not); lost: workers left as they were."""

    fault: str | None = None
    lost: list[str] = field(default_factory=list)


# What a container and its service look like


def image(data: HostData, digest: str) -> str:
    """By digest, from the worker's own registry."""
    return f"127.0.0.1:{data.registry_port}/{data.app_name}@{digest}"


def environment(data: HostData, version: str) -> dict[str, str]:
    """The same as in the Nomad job (templates/app/app.nomad.hcl.j2)."""
    return {**_plain(data, version), **app_secrets.environment(data)}


def _plain(data: HostData, version: str) -> dict[str, str]:
    return {"APP_VERSION": version, **{name: str(value) for name, value in data.app_env.items()}}


def arguments(data: HostData, colour: str) -> list[str]:
    """`docker run` arguments: the limits of the Nomad job, on this colour's port."""
    return [
        f"--name={data.app_name}-{colour}",
        f"--publish={data.address}:{_port(data, colour)}:{data.app_port}",
        "--restart=unless-stopped",
        f"--user={data.app_user}",
        "--read-only",
        "--tmpfs=/tmp:size=64m",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        f"--pids-limit={data.app_pids_limit}",
        f"--cpu-shares={data.app_cpu_mhz}",
        f"--memory={data.app_memory_mb}m",
        *_secrets_mount(data, colour),
    ]


def _secrets_mount(data: HostData, colour: str) -> list[str]:
    if not app_secrets.as_file(data):
        return []
    source = _secrets_file(f"{data.app_name}-{colour}")
    return [f"--mount=type=bind,source={source},target={app_secrets.FILE},readonly"]


def _secrets_file(name: str) -> str:
    """On the worker, for the container of this name."""
    return f"/etc/hashistack/secrets/{name}.env"


def settings_hash(data: HostData, version: str) -> str:
    """Of all that shapes a container beside its image; of secrets their stamp."""
    containers = [[arguments(data, colour), _service(data, colour, version)] for colour in COLOURS]
    stamps = [stamp] if (stamp := app_secrets.stamp(data)) else []
    return _hash([containers, sorted(_plain(data, version).items()), *stamps])


def _hash(shape: object) -> str:
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:16]


def service_file(data: HostData, instances: list[Instance]) -> str:
    """Consul's service file for these instances."""
    found = sorted(instances, key=lambda i: i.colour)
    services = [_service(data, i.colour, i.version) | _token(data) for i in found]
    return json.dumps({"services": services}, indent=2) + "\n"


def _token(data: HostData) -> dict[str, str]:
    """With which the agent registers a service."""
    if not data.secure:
        return {}
    return {"token": secrets.token(secrets.folder(data), "consul-registration")}


def _service(data: HostData, colour: str, version: str) -> dict[str, Any]:
    port = _port(data, colour)
    return {
        "id": f"{data.app_name}-{colour}",
        "name": data.app_name,
        "address": data.address,
        "port": port,
        "tags": [f"version-{version}"],
        "meta": {"version": version},
        "check": {
            "http": f"http://{data.address}:{port}{data.app_health_path}",
            "interval": "2s",
            "timeout": "2s",
        },
    }


def _port(data: HostData, colour: str) -> int:
    return int(data.app_ports[COLOURS.index(colour)])


# What runs


def instances(member: Host) -> list[Instance]:
    """The app's containers on a worker, at most one of each colour, stopped ones included."""
    fields = "".join(f'|{{{{.Label "hashistack.{label}"}}}}' for label in LABELS)
    lines = _run(
        member,
        f"docker ps --all --filter label=hashistack.app={shlex.quote(member.data.app_name)}"
        f" --format '{{{{.State}}}}|{{{{.CreatedAt}}}}{fields}'",
    )
    return sorted((Instance(*line.split("|")) for line in lines), key=lambda i: i.colour)


def running_versions(member: Host) -> set[str]:
    """One version; two while a release is under way or was interrupted; none before the first one."""
    return {instance.version for instance in instances(member) if instance.up}


def outdated(workers: list[Host], release: Release) -> list[Host]:
    """The workers that do not run and serve exactly this version, image and configuration."""
    return [worker for worker in workers if not _done(worker, release)]


def _done(member: Host, release: Release) -> bool:
    """False also for a worker that cannot be asked: the roll finds out what is wrong with it."""
    try:
        up = [instance for instance in instances(member) if instance.up]
        return (
            len(up) == 1
            and _is(member, up[0], release)
            and _service_lines(member) == service_file(member.data, up).splitlines()
            and set(_statuses(member)) == {up[0].name}
        )
    except (Failed, Lost, *Unavailable):
        return False


def _service_lines(member: Host) -> list[str]:
    return _run(member, f"! test -e {SERVICE_FILE} || cat {SERVICE_FILE}")


def _is(member: Host, instance: Instance, release: Release) -> bool:
    settings = settings_hash(member.data, release.version)
    found = (instance.version, instance.digest, instance.settings)
    return found == (release.version, release.digest, settings)


def _statuses(member: Host) -> dict[str, str]:
    """Service ID -> "passing" or another status, of this worker's instances in Consul's catalog."""
    with consul_api(member) as api:
        entries = api.health.service(member.data.app_name)[1]
    return {e["Service"]["ID"]: _status(e["Checks"]) for e in entries if e["Node"]["Node"] == member.name}


def _status(checks: list[dict[str, str]]) -> str:
    return next((check["Status"] for check in checks if check["Status"] != "passing"), "passing")


def _complaint(member: Host, instance: Instance) -> str:
    """What its check says. The agent knows at once; the catalog learns of new words minutes later."""
    with consul_api(member) as api:
        checks = api.agent.checks().values()
    said = [check["Output"].strip() for check in checks if check["ServiceID"] == instance.name]
    return "".join(said) or "not checked yet"


# The roll


def roll(workers: list[Host], release: Release, stop: Callable[[], str | None] = lambda: None) -> Outcome:
    """Bring `release` to these workers (see `outdated`); for one driving host.

    First, all at once, the workers where nothing serves, then one after the other. After a failure
    the workers that had already moved go back. A worker that is lost is left out. Once `stop` says why,
    nothing is begun any more, not even the way back: another run may be at work.
    """
    outcome = Outcome()
    moved: list[tuple[Host, Instance | None]] = []

    def move(member: Host) -> None:
        try:
            before = _replace(member, release)
            if before is None or not _is(member, before, release):
                moved.append((member, before))
        except Lost as lost:
            logger.warning(f"{lost}. It is left as it is: release {release.version} again when it is back")
            outcome.lost.append(member.name)
        except Failed as failed:
            outcome.fault = outcome.fault or str(failed)
        except Unavailable as silent:
            outcome.fault = outcome.fault or f"{member.name}: Consul does not answer ({silent})"

    busy = [worker for worker in workers if _serves(worker)]
    gevent.joinall([gevent.spawn(move, worker) for worker in workers if worker not in busy], raise_error=True)
    for worker in busy:
        if outcome.fault is None and not stop():
            move(worker)
    stopped = stop()
    if stopped:
        outcome.fault = "\n".join(filter(None, [outcome.fault, stopped]))
    elif outcome.fault:
        outcome.fault += "".join(f"\n{_go_back(*pair)}" for pair in reversed(moved))
    elif workers and len(outcome.lost) == len(workers):
        outcome.fault = "every worker was lost"
    return outcome


def _serves(member: Host) -> bool:
    """A worker that cannot be asked takes its turn, and is found lost or broken then."""
    try:
        return any(instance.up for instance in instances(member))
    except (Failed, Lost):
        return True


def _replace(member: Host, release: Release) -> Instance | None:
    """Bring `release` to one worker; returns what ran before. A new one that fails is taken away."""
    found = instances(member)
    new = next((i for i in found if i.up and _is(member, i, release)), None)
    colour = new.colour if new else _free_colour(member, found)
    old = next((i for i in found if i.up and i.colour != colour), None)
    if new and not old:  # it runs alone already, and only has to be in Consul
        _join(member, new, None)
        return new
    new = new or _start(member, colour, release, old)
    try:
        _join(member, new, old)
    except Failed as fault:
        raise Failed(f"{fault}\n{_take_away(member, new, old)}") from None
    if old:
        _leave(member, old, new)
    return old


def _free_colour(member: Host, found: list[Instance]) -> str:
    """The colour to start in: where nothing runs, the older one if there is a choice."""
    up = [instance for instance in found if instance.up]
    if len(up) == 2:  # interrupted before, and now another version is wanted: the healthy one stays
        passing = _statuses(member)
        keep, drop = sorted(up, key=lambda i: (passing.get(i.name) != "passing", i.created))
        _leave(member, drop, keep)
        return drop.colour
    created = {instance.colour: instance.created for instance in found}
    free = [colour for colour in COLOURS if colour not in {instance.colour for instance in up}]
    return min(free, key=lambda colour: created.get(colour, ""))


def _start(member: Host, colour: str, release: Release, old: Instance | None) -> Instance:
    """Start the new container beside the old one, which alone is in Consul until then."""
    data = member.data
    labels = dict(
        app=data.app_name,
        colour=colour,
        version=release.version,
        digest=release.digest,
        settings=settings_hash(data, release.version),
    )
    new = Instance(state="running", created="", **labels)
    _register(member, [old] if old else [])
    _say(member, f"starting {new.name}, version {new.version}")
    run = ["docker", "run", "--detach", "--env-file=/dev/stdin", *arguments(data, colour)]
    run += [f"--label=hashistack.{name}={value}" for name, value in labels.items()]
    run += [image(data, release.digest)]
    remove = f"docker rm --force {new.name}"
    _run(member, f"! docker inspect {new.name} >/dev/null 2>&1 || {remove}")
    if app_secrets.as_file(data):
        _write_secrets(member, new.name)
    try:
        # Standard input may be a socket, which cannot be opened by its path; cat's pipe can.
        _run(member, f"cat | {shlex.join(run)}", stdin=_env_file(member, release.version))
    except Failed:
        _run(member, f"{remove} 2>&1 || true")
        raise
    return new


def _write_secrets(member: Host, name: str) -> None:
    """A new file each time: a container keeps the one that it was started with."""
    file, owner = _secrets_file(name), shlex.quote(str(member.data.app_user))
    _run(
        member,
        f"install -d -m 700 {PurePosixPath(file).parent} && install -m 600 /dev/null {file}.new"
        f" && cat > {file}.new && chown {owner} {file}.new && mv -T {file}.new {file}",
        stdin=app_secrets.text(member.data),
    )


def _env_file(member: Host, version: str) -> str:
    """For standard input: these values may be secret, so they show in no argument and no file."""
    lines = [f"{name}={value}" for name, value in environment(member.data, version).items()]
    if any("\n" in line for line in lines):
        raise Failed("app_env: a value with a line break cannot be given to a container")
    return "\n".join(lines) + "\n"


def _join(member: Host, new: Instance, old: Instance | None) -> None:
    """Add `new` in Consul, and wait until it has been healthy for app_min_healthy_s.

    As with Nomad, that is also the time in which every HAProxy learns of it.
    """
    _register(member, [old, new] if old else [new])
    deadline_s = float(member.data.app_healthy_deadline_s)
    missing = wait_until(
        f"{new.name} {new.version}",
        _healthy(member, new, float(member.data.app_min_healthy_s)),
        deadline_s,
        lambda line: _say(member, line),
    )
    if missing:
        raise Failed(f"{member.name}: {new.name} {new.version} not healthy in {deadline_s:.0f} s: {missing}")


def _healthy(member: Host, new: Instance, min_healthy_s: float) -> Callable[[], str | None]:
    since: float | None = None

    def check() -> str | None:
        nonlocal since
        try:
            complaint = None if _statuses(member).get(new.name) == "passing" else _complaint(member, new)
        except Unavailable:
            complaint = "Consul does not answer"
        if complaint:
            since = None
            _raise_if_crashing(member, new)
            return complaint
        since = since or time.monotonic()
        return None if time.monotonic() - since >= min_healthy_s else "healthy, and watched"

    return check


def _raise_if_crashing(member: Host, new: Instance) -> None:
    """No need to wait for the deadline when Docker has restarted it in vain. Also finds a lost worker."""
    look = "docker inspect --format '{{.RestartCount}} {{.State.ExitCode}} {{.State.OOMKilled}}'"
    restarts, code, out_of_memory = _run(member, f"{look} {new.name}")[0].split()
    if int(restarts) > 2:
        why = "it has too little memory" if out_of_memory == "true" else f"exit code {code}"
        raise Failed(f"{member.name}: {new.name} {new.version} stops again and again, {why}")


def _leave(member: Host, old: Instance, new: Instance | None) -> None:
    """Take `old` out of Consul, wait until no HAProxy sends to it, and stop it."""
    _register(member, [new] if new else [])
    _drain(member, old)
    grace_s = int(member.data.app_kill_timeout_s)
    _run(member, f"docker stop --time {grace_s} {old.name}", timeout_s=grace_s + 60)


def _drain(member: Host, old: Instance) -> None:
    wait_until(
        f"HAProxy to let go of {old.name}",
        lambda: "it still serves",
        float(member.data.app_shutdown_delay_s),
        lambda line: _say(member, line),
    )


def _take_away(member: Host, new: Instance, old: Instance | None) -> str:
    """Remove a container that failed, in the order that drops no request; returns its last log lines."""
    log = _run(member, f"docker logs --tail 10 {new.name} 2>&1 || true") or ["it logged nothing"]
    try:
        _leave(member, new, old)
        _run(member, f"docker rm --force {new.name}")
    except Failed as fault:
        log.append(f"it could not be removed: {fault}")
    return "\n".join(f"  {new.name}: {line}" for line in log)


def _go_back(member: Host, old: Instance | None) -> str:
    """Replace a new container by the one that ran before, if any; returns how that went in one line."""
    _say(member, f"going back to {old.version if old else 'nothing'}")
    try:
        new = next(i for i in instances(member) if i.up and i != old)
        if old:
            _run(member, f"docker start {old.name}")
            _join(member, old, new)
        _leave(member, new, old)
        _run(member, f"docker rm --force {new.name}")
    except (Failed, Lost, *Unavailable) as fault:
        return f"{member.name}: could not go back: {fault}"
    return f"{member.name}: back to {old.version}" if old else f"{member.name}: runs no app, as before"


def _register(member: Host, services: list[Instance]) -> None:
    """Make these the worker's instances in Consul, and see that its catalog has them."""
    part = f"{SERVICE_FILE}.new"  # Consul reads *.json and *.hcl
    _run(
        member,
        f"umask 077 && cat > {part} && chown consul:consul {part} && mv {part} {SERVICE_FILE}"
        " && systemctl reload consul",
        stdin=service_file(member.data, services),
    )
    wanted = {service.name for service in services}
    missing = wait_until(
        "Consul to take the service file",
        lambda: None if set(_statuses(member)) == wanted else "its catalog has other instances",
        float(member.data.roll_deadline_s),
        lambda line: _say(member, line),
    )
    if missing:
        _run(member, "true")  # raises Lost if that is the reason
        raise Failed(f"{member.name}: {SERVICE_FILE} written, but {missing}; see journalctl -u consul there")


def _run(member: Host, command: str, stdin: str | None = None, timeout_s: int = 120) -> list[str]:
    """The lines that `command` prints on a worker, as root. Raises Failed, or Lost."""
    try:
        with gevent.Timeout(timeout_s, TimeoutError(f"no answer in {timeout_s} s")):
            ok, output = shell.run(member, command, _stdin=stdin)
            if not ok:  # a connection that broke looks like a command that failed, without a word
                member.run_shell_command("true")
    except (SSHException, EOFError, OSError) as error:
        raise Lost(f"{member.name}: lost, {error or type(error).__name__}") from None
    if not ok:
        reason = " ".join(line for line in output.stderr_lines if line and "--help" not in line)
        raise Failed(f"{member.name}: {reason or f'no message from {command}'}")
    lines: list[str] = output.stdout_lines
    return lines


def _say(member: Host, line: str) -> None:
    logger.info(f"{member.print_prefix}{line}")


@operation()
def renew_service_file() -> Generator[StringCommand | str]:
    """Give what serves on this worker to Consul again, with the token that it now has."""
    found = "\n".join(_service_lines(host))
    services = [service | _token(host.data) for service in json.loads(found or "{}").get("services", [])]
    text = json.dumps({"services": services}, indent=2)
    if not services or text == found:
        host.noop("its token is current")
        return
    yield config.replace(config.File(SERVICE_FILE, f"{text}\n", mode="600", owner="consul:consul"))
    yield "systemctl reload consul"


# Around a restart of Docker


def spare(member: Host) -> str | None:
    """Why this worker cannot be paused without an outage, or None."""
    with consul_api(member) as api:
        entries = api.health.service(member.data.app_name, passing=True)[1]
    serving = {entry["Node"]["Node"] for entry in entries}
    return f"no other worker serves {member.data.app_name}" if serving == {member.name} else None


def pause(member: Host) -> str | None:
    """Take the worker's instances out of Consul and drain them, but let them run. What failed, or None."""
    try:
        up = [instance for instance in instances(member) if instance.up]
        if up:
            _register(member, [])
            _drain(member, up[0])
    except (Failed, Lost) as fault:
        return str(fault)
    return None


def resume(member: Host) -> str | None:
    """Put what runs back into Consul, and wait until it is healthy. What failed, or None."""
    try:
        up = [instance for instance in instances(member) if instance.up]
        if up:
            _join(member, up[-1], up[0] if len(up) == 2 else None)
    except (Failed, Lost) as fault:
        return str(fault)
    return None


@operation()
def resume_if_paused() -> Generator[FunctionCommand]:
    """Put back what an interrupted run has taken out of Consul; what release.py left is its own."""
    if not _paused(host):
        host.noop("what runs is in Consul")
        return
    yield FunctionCommand(_resume, (), {})


def _paused(member: Host) -> bool:
    """Something runs, and nothing of it is in the service file. False without a Docker to ask."""
    try:
        up = [instance for instance in instances(member) if instance.up]
        registered = "".join(_service_lines(member))
    except (Failed, Lost):
        return False
    return bool(up) and not any(f'"id": "{instance.name}"' in registered for instance in up)


def _resume(state: State, host: Host) -> bool:
    fault = resume(host)
    if fault:
        logger.error(fault)
    return fault is None


# The registry


@deploy("Docker")
def configure() -> None:
    """Before Docker's first start, so that a reboot finds it."""
    unit = config.write(
        name="Let Docker wait for the private address",
        files=[config.File(DOCKER_UNIT, config.render("containers/private-address.conf"))],
    )
    systemd.daemon_reload(name="Read Docker's unit again", _if=unit.did_change)


@deploy("Registry")
def run_registry() -> None:
    """On this worker; whether it answers is to be asked of Consul."""
    run_registry_container(name="Run a registry")
    text = json.dumps({"service": registry_service(host.data) | _token(host.data)}, indent=2) + "\n"
    config.write(
        name="Describe the registry to Consul",
        files=[config.File(REGISTRY_FILE, text, mode="600", owner="consul:consul")],
    )
    reload_consul_if_unaware(name="Register the registry in Consul", service=registry_service(host.data))


def registry_arguments(data: HostData) -> list[str]:
    """`docker run` arguments, image included; the limits of the registry's Nomad job."""
    port = data.registry_port
    return [
        "--name=registry",
        f"--publish=127.0.0.1:{port}:5000",
        f"--publish={data.address}:{port}:5000",
        "--restart=unless-stopped",
        "--read-only",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--volume=/var/lib/registry:/var/lib/registry",
        data.registry_image,
    ]


def registry_service(data: HostData) -> dict[str, Any]:
    """The registry in Consul, as its Nomad job registers it."""
    return {
        "id": "registry",
        "name": "registry",
        "address": data.address,
        "port": data.registry_port,
        "check": {
            "http": f"http://{data.address}:{data.registry_port}/v2/",
            "interval": "10s",
            "timeout": "2s",
        },
    }


class ContainerSettings(FactBase[str]):
    """The label hashistack.settings of a running container; "" if it does not run."""

    def command(self, container: str) -> str:
        return (
            "! command -v docker >/dev/null || docker ps"
            f" --filter name=^{container}$ --format '{{{{.Label \"hashistack.settings\"}}}}' || true"
        )

    def process(self, output: Iterable[str]) -> str:
        return "".join(output).strip()


@operation()
def run_registry_container() -> Generator[str]:
    """Run it anew where it does not run with these arguments (docker.container would not see them)."""
    wanted = registry_arguments(host.data)
    settings = _hash(wanted)
    if host.get_fact(ContainerSettings, container="registry") == settings:
        host.noop("the registry runs as it should")
        return
    yield "install -d -m 700 /var/lib/registry"  # Docker would make it readable for all
    yield "! docker inspect registry >/dev/null 2>&1 || docker rm --force registry"
    yield shlex.join(["docker", "run", "--detach", f"--label=hashistack.settings={settings}", *wanted])


@operation()
def reload_consul_if_unaware(service: dict[str, Any]) -> Generator[str]:
    """Reload where the agent does not have this service: what it knows decides, not what we wrote."""
    try:
        with consul_api(host) as api:
            known = api.agent.services().get(service["id"], {})
    except Unavailable:
        known = {}
    if (known.get("Address"), known.get("Port")) == (service["address"], service["port"]):
        host.noop("Consul knows the registry")
        return
    yield "systemctl reload consul"
