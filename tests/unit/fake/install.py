"""Install what has a configuration that its own tool can check, on hosts that have nothing yet."""

from pyinfra import host

from tasks import base, consul, docker, nomad, preflight

preflight.make_secrets()
base.configure()
consul.install()
if "workers" in host.groups:
    docker.configure()
    nomad.install()
