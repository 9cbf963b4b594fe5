"""What deploy.py asks before it changes anything, then one operation."""

from pyinfra.operations import server

from tasks import preflight

preflight.check_hosts()
preflight.check_groups()
preflight.check_host()
server.shell(name="Go on", commands=["go on"])
