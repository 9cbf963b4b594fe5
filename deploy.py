"""What runs where: pyinfra inventory.py deploy.py [--data only=haproxy,dns]

Installs or converges the whole stack. A second run changes nothing.
"""

from pyinfra import host

from tasks import (
    acl,
    base,
    consul,
    distribute,
    dns,
    docker,
    firewall,
    haproxy,
    keepalived,
    lock,
    nomad,
    preflight,
    registry,
    vip,
)

ROLES = ["base", "firewall", "consul", "docker", "dns", "nomad", "registry", "haproxy", "keepalived"]

preflight.check_hosts()
roles = preflight.wanted(ROLES)
preflight.check_groups()
preflight.check_host()
preflight.make_secrets()
preflight.stop_at_first_failure(name="Stop at the first failure")
# Two deploys might restart two servers at once. New hosts have no Consul to ask.
lock.hold(name="Let no other run begin", what="deploy", needed=False)

is_worker = "workers" in host.groups
is_proxy = "proxies" in host.groups
by_nomad = host.data.scheduler == "nomad"

if "docker" in roles and is_worker:
    docker.configure()
if "registry" in roles and is_worker:
    registry.configure()
if "base" in roles:
    base.configure()
if "consul" in roles:
    consul.install()
    consul.start()
if "base" in roles:
    base.install()
if "firewall" in roles:
    firewall.install()
# By now Consul has its first leader; nobody else has come with a token yet.
if "consul" in roles and host.data.secure:
    acl.grant()
if "docker" in roles and is_worker:
    docker.start()
if "dns" in roles:
    dns.install()
if "nomad" in roles and is_worker and by_nomad:
    nomad.install()
    nomad.start()
# Meanwhile the new clusters elect their leaders, for which the rolls wait.
if "registry" in roles and is_worker:
    registry.install()
if "haproxy" in roles and is_proxy:
    haproxy.install()
if "consul" in roles:
    consul.roll()
if "nomad" in roles and is_worker and by_nomad:
    nomad.roll()
if "docker" in roles and is_worker:
    docker.roll()
if "registry" in roles and is_worker:
    registry.run()
    distribute.resync(name="Fill this worker's registry from the others")
if "haproxy" in roles:
    haproxy.roll()
if "keepalived" in roles and vip.wanted(host):
    keepalived.install()
if "keepalived" in roles:
    keepalived.roll()
lock.give_back(name="Let the next run begin")
