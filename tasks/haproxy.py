"""HAProxy on group `proxies`: consul-template renders its configuration, haproxy-apply puts it in place.

consul-template (unprivileged) renders a whole configuration into a spool. A systemd path unit starts
haproxy-apply (root), which checks it, swaps it in, reloads HAProxy and sees that the new worker runs;
otherwise the old configuration stays. deploy.py never writes the live file: a changed knob is a changed
template, and takes the same way as a changed backend.

Servers in the backend are named <app>-<version>-<address>-<port>, so that HAProxy's statistics
(http://127.0.0.1:8404/;csv on the proxy) show which version serves. The version is
the service's `version` metadata in Consul, "unknown" without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable
from pathlib import Path

from pyinfra import host
from pyinfra.api import DeployError, FactBase, deploy, operation
from pyinfra.api.host import Host, HostData

from tasks import artifact, certificates, config, rolling, secrets, shell

CERTIFICATE = "/etc/haproxy/tls/site.pem"  # with its chain and its key
LIVE = "/etc/haproxy/haproxy.cfg"
WITHOUT_SERVERS = "/etc/haproxy/without-servers.cfg"  # what LIVE is but for its server lines
SPOOL = "/var/lib/consul-template/haproxy.cfg"
FAULT = "/var/lib/haproxy-apply/fault"  # one line, there while the newest candidate is not live
SYSTEMD = "/etc/systemd/system"
DROP_IN = f"{SYSTEMD}/haproxy.service.d/hashistack.conf"
APPLY = "/usr/local/sbin/haproxy-apply"
SETTINGS = "/etc/consul-template/consul-template.hcl"
TEMPLATE = "/etc/consul-template/haproxy.cfg.ctmpl"
CONSUL_TEMPLATE = [
    SETTINGS,
    TEMPLATE,
    f"{SYSTEMD}/consul-template.service",
    "/usr/local/bin/consul-template",
]


def before_package() -> list[config.File]:
    """The package starts HAProxy, which nobody restarts: it has to find its limits then."""
    return [config.File(DROP_IN, config.render("haproxy/haproxy.conf"))]


@deploy("HAProxy")
def install() -> None:
    hold_package(name="Hold HAProxy's package", package="haproxy")
    config.create_user(name="Create consul-template's user", user="consul-template")
    artifact.install(
        name="Install consul-template",
        tool="consul-template",
        version=host.data.consul_template_version,
    )
    _configure()
    load_units(name="Load the units and watch the spool")
    put_first(name="Answer 503 until consul-template has found the app")
    rolling.start_if_stopped(name="Start HAProxy where it is stopped", unit="haproxy", files=[DROP_IN])
    rolling.start_if_stopped(
        name="Start consul-template where it is stopped", unit="consul-template", files=CONSUL_TEMPLATE
    )


@deploy("HAProxy")
def roll() -> None:
    """One proxy at a time for a changed template: one that HAProxy refuses stops at the first proxy."""
    # One of them: on another host it would not wait for what a proxy still has to do.
    if rolling.leads("proxies"):
        rolling.roll(name="Restart consul-template where it is stale, one proxy at a time", service=SERVICE)
    if "proxies" in host.groups:
        rolling.wait_until_healthy(
            name="Check that HAProxy runs with the current template",
            what="HAProxy",
            fault=lambda: fault_of(host),
        )


def _configure() -> None:
    pem = _certificate()
    units = ("consul-template.service", "haproxy-apply.service", "haproxy-apply.path")
    config.write(
        name="Configure consul-template and haproxy-apply",
        files=[
            config.File(
                SETTINGS,
                config.render("haproxy/consul-template.hcl.j2", token=_token()),
                mode="600",
                owner="consul-template:consul-template",
            ),
            *([config.File(CERTIFICATE, pem, mode="600")] if pem else []),
            config.File(TEMPLATE, _configuration(pem, discover=True)),
            config.File(WITHOUT_SERVERS, _configuration(pem, discover=False)),
            config.File(APPLY, config.render("haproxy/haproxy-apply"), mode="755"),
            *before_package(),
            *(config.File(f"{SYSTEMD}/{unit}", config.render(f"haproxy/{unit}")) for unit in units),
        ],
    )


def _configuration(pem: str, discover: bool) -> str:
    mark = hashlib.sha256(pem.encode()).hexdigest()[:16] if pem else ""
    return config.render(
        "haproxy/haproxy.cfg.j2", discover=discover, certificate=mark, certificate_file=CERTIFICATE
    )


def encrypts(data: HostData) -> bool:
    """Whether HAProxy has a door with TLS."""
    return bool(data.secure or data.haproxy_certificate)


def _certificate() -> str:
    """The user's own, or one from our CA, as PEM with chain and key; "" without TLS."""
    own = host.data.haproxy_certificate
    if own and not Path(own).is_file():
        raise DeployError(f"haproxy_certificate={own}: no such file; it holds certificate, chain and key")
    if own:
        return Path(own).read_text()
    pair = certificates.certificate(host, "haproxy") if encrypts(host.data) else None
    return pair.pem + pair.key if pair else ""


def _token() -> str:
    """consul-template's in Consul; "" without security."""
    return secrets.token(secrets.folder(host.data), "consul-template") if host.data.secure else ""


class Answer(FactBase[bool]):
    """Whether a shell condition holds on the host."""

    def command(self, condition: str) -> str:
        return f"if {condition}; then echo yes; else echo no; fi"

    def process(self, output: Iterable[str]) -> bool:
        return list(output)[-1:] == ["yes"]


@operation()
def hold_package(package: str) -> Generator[str]:
    """An upgrade of the package would restart its service; we only ever reload it."""
    if host.get_fact(Answer, condition=f"apt-mark showhold {package} | grep -qx {package}"):
        host.noop(f"{package} is held")
        return
    yield f"apt-mark hold {package}"


@operation()
def load_units() -> Generator[str]:
    """Make systemd read unit files that are newer than what it knows, and start the path unit."""
    units = "haproxy.service consul-template.service haproxy-apply.service haproxy-apply.path"
    current = (
        f"! systemctl show -P NeedDaemonReload {units} | grep -q yes"
        " && systemctl is-active -q haproxy-apply.path && systemctl is-enabled -q haproxy-apply.path"
    )
    if host.get_fact(Answer, condition=current):
        host.noop("systemd knows the current units")
        return
    yield "systemctl daemon-reload"
    yield "systemctl enable -q haproxy-apply.path && systemctl restart haproxy-apply.path"


@operation()
def put_first() -> Generator[str]:
    """Replace a live configuration that is not ours (the package's) by one without servers."""
    if host.get_fact(Answer, condition=f"grep -qs '^# Rendered by consul-template' {LIVE}"):
        host.noop("HAProxy has our configuration")
        return
    yield "install -d -o consul-template -g consul-template /var/lib/consul-template"
    yield f"cp {WITHOUT_SERVERS} {SPOOL}.first && mv {SPOOL}.first {SPOOL}"
    yield f"systemctl start haproxy-apply.service || {{ cat {FAULT} >&2; exit 1; }}"


def fault_of(member: Host) -> str | None:
    """What keeps HAProxy from running with the current template and Consul's newest answer, or None."""
    command = (
        f"if [ -s {FAULT} ]; then cat {FAULT};"
        " elif ! systemctl is-active -q haproxy; then echo HAProxy does not run;"
        " elif ! systemctl is-active -q consul-template; then echo consul-template does not run;"
        f" elif ! grep -v '^ *server ' {LIVE} | cmp -s - {WITHOUT_SERVERS};"
        " then echo consul-template has not rendered the current template yet; fi"
    )
    ok, output = shell.run(member, command)
    return output.stdout.strip() or (None if ok else f"cannot ask: {output.stderr}")


SERVICE = rolling.Service(
    unit="consul-template",
    files=CONSUL_TEMPLATE,
    rank=lambda member: 1,
    gate=lambda member: None,  # HAProxy serves without it
    recovery=lambda member: lambda: fault_of(member),
    group="proxies",
)
