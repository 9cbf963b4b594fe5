"""deploy.py on a running cluster, under load: nothing to do, a change that rolls, a run cut off."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from group_data import all as knobs
from tests.lab import hosts, outside
from tests.lab.watch import PORTS, Watch
from tests.load import Load

# Knobs that restart a service and change nothing that anybody would notice.
CHANGES = {
    "consul": f"consul_raft_multiplier={knobs.consul_raft_multiplier + 1}",
    "nomad": "nomad_image_delay=721h",
}


def test_second_run_changes_nothing() -> None:
    run = hosts.pyinfra("deploy.py")
    assert (run.code, run.changed, run.failed) == (0, {}, {}), run.output


def test_change_rolls_and_interrupted_way_back_converges(load: Load, tmp_path: Path) -> None:
    most_on_a_worker = Counter(name.split("-")[2] for name in hosts.haproxy_servers()).most_common(1)[0][1]
    with Watch() as watch:
        leaders = {service: leader(service) for service in PORTS}
        run = hosts.pyinfra("deploy.py", *(f"--data={CHANGES[service]}" for service in PORTS))
        assert run.code == 0, run.output
        for service in PORTS:
            order = restarts(run.output, service)
            assert sorted(order) == hosts.names("servers")
            assert order[-1] == leaders[service]
            assert watch.stops(service) == order

        for line in dict.fromkeys(re.findall(r"restarting \S+", run.output)):
            kill_deploy_once(line, tmp_path / "log")
        run = hosts.pyinfra("deploy.py")
        assert run.code == 0, run.output
        for service in PORTS:
            assert set(watch.stops(service)[3:]) == set(hosts.names("servers"))
        assert watch.fewest_servers() >= knobs.app_count - most_on_a_worker
    test_second_run_changes_nothing()


def test_docker_restarts_after_its_instances_have_left(load: Load, tmp_path: Path) -> None:
    """On one worker, at the second try: the first is cut off while they leave."""
    address = next(iter(hosts.haproxy_servers())).split("-")[2]
    worker = next(name for name, data in hosts.HOSTS.items() if data["address"] == address)
    change = f"--data=docker_log_max_file={knobs.docker_log_max_file + 1}"
    only = ("--limit", worker, "--data=only=docker,registry")
    kill_deploy_once("waiting 5 s for", tmp_path / "log", *only, change)
    for arguments in ((*only, change), only):
        run = hosts.pyinfra("deploy.py", *arguments)
        assert run.code == 0, run.output
        assert restarts(run.output, "docker") == [worker]
        assert outside.open_ports(address) == {knobs.firewall_ssh_port}
    test_second_run_changes_nothing()


def leader(service: str) -> str:
    """The server that leads."""
    says = hosts.api(hosts.names("servers")[0], PORTS[service], "/v1/status/leader")
    address = says.split(":")[0]
    return next(name for name, data in hosts.HOSTS.items() if data["address"] == address)


def restarts(output: str, service: str) -> list[str]:
    """The hosts that a run restarted the service on, in order."""
    return re.findall(rf"\[(\S+)\]\s+restarting {service}", output)


def kill_deploy_once(line: str, log: Path, *arguments: str) -> None:
    """Begin deploy.py, and kill it as soon as it prints this."""
    command = [sys.executable, "-m", "pyinfra", "-y", "inventory.py", "deploy.py", *arguments]
    with log.open("w") as out:
        run = subprocess.Popen(command, cwd=hosts.ROOT, stdout=out, stderr=out)
    while run.poll() is None and line not in log.read_text():
        time.sleep(0.05)
    run.kill()
    assert run.wait() == -signal.SIGKILL, log.read_text()
