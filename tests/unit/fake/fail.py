"""Two operations; whether the second runs after the first has failed on one host is the question."""

from pyinfra import host
from pyinfra.operations import server

from tasks import preflight

if not host.data.get("careless"):
    preflight.stop_at_first_failure(name="Stop at the first failure")
server.shell(name="First", commands=["first"])
server.shell(name="Second", commands=["second"])
