"""Say whether the app was ever released: pyinfra -y inventory.py lab/released.py

`make up` makes the first release only where the answer is no, so it never replaces a later version.
"""

from __future__ import annotations

from nomad.api.exceptions import URLNotFoundNomadException
from pyinfra import host

from tasks import cluster, containers, preflight, rolling


def _in_nomad() -> bool:
    with cluster.nomad_api(host) as api:
        try:
            return bool(api.job.get_job(host.data.app_name)["Status"] != "dead")
        except URLNotFoundNomadException:
            return False


def _in_docker() -> bool:
    return any(containers.instances(worker) for worker in rolling.members("workers"))


preflight.check_workers()
if rolling.leads("workers"):
    found = _in_nomad() if host.data.scheduler == "nomad" else _in_docker()
    print(f"released: {'yes' if found else 'no'}")
