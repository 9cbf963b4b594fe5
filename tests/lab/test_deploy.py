"""deploy.py on a running cluster, under load: nothing to do, a change that rolls, and one cut off half-way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

from group_data import all as knobs
from tests.lab import hosts
from tests.lab.watch import PORTS, Watch
from tests.load import Load

# A knob of each service that restarts it and changes nothing that anybody would notice.
CHANGES = {
    "consul": f"consul_raft_multiplier={knobs.consul_raft_multiplier + 1}",
    "nomad": "nomad_image_delay=721h",
    "docker": f"docker_log_max_file={knobs.docker_log_max_file + 1}",
}
ROLLED = [*PORTS, "docker"]


def test_second_run_changes_nothing() -> None:
    run = hosts.pyinfra("deploy.py")
    assert (run.code, run.changed, run.failed) == (0, {}, {}), run.output


def test_change_rolls_and_interrupted_way_back_converges(load: Load) -> None:
    with Watch() as watch:
        leaders = {service: leader(service) for service in PORTS}
        run = hosts.pyinfra("deploy.py", *(f"--data={CHANGES[name]}" for name in ROLLED))
        assert run.code == 0, run.output
        order = restarts(run.output)
        for service in PORTS:
            assert sorted(order[service]) == hosts.names("servers")
            assert order[service][-1] == leaders[service]
            assert watch.stops(service) == order[service]
        assert sorted(order["docker"]) == hosts.names("workers")

        for service in ROLLED:
            kill_deploy_at(f"restarting {service}")
        run = hosts.pyinfra("deploy.py")
        assert run.code == 0, run.output
        for service in PORTS:
            assert set(watch.stops(service)[3:]) == set(hosts.names("servers"))
    test_second_run_changes_nothing()


def leader(service: str) -> str:
    """The server that leads."""
    says = hosts.api(hosts.names("servers")[0], PORTS[service], "/v1/status/leader")
    address = says.split(":")[0]
    return next(name for name, data in hosts.HOSTS.items() if data["address"] == address)


def restarts(output: str) -> dict[str, list[str]]:
    """Service -> the hosts that a run restarted it on, in order."""
    found = re.findall(r"\[(\S+)\]\s+restarting (\S+)", output)
    return {service: [host for host, name in found if name == service] for service in ROLLED}


def kill_deploy_at(line: str) -> None:
    """Begin deploy.py and kill it when it prints `line`."""
    run = subprocess.Popen(
        [sys.executable, "-m", "pyinfra", "-y", "inventory.py", "deploy.py"],
        cwd=hosts.ROOT,
        env=os.environ | {"PYINFRA_YES": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert run.stderr
    with run.stderr:
        printed = []
        for printed_line in run.stderr:
            printed.append(printed_line)
            if line in printed_line:
                run.kill()
                break
    assert run.wait() == -signal.SIGKILL, "".join(printed)
