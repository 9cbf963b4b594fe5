"""One screen about the whole cluster: pyinfra -y inventory.py status.py [--data format=json]

Exit code 0 only if all is healthy. Changes nothing; hosts that are down are shown.
"""

import json
import sys

from pyinfra import host
from pyinfra.api import DeployError

from tasks import cluster, report, rolling, survey

if host.data.get("format") not in (None, "table", "json"):
    raise DeployError(f"format={host.data.format}: choose table or json")

if rolling.driver():
    cluster.act_as("status", host.data)
    found = survey.survey()
    wrong = report.faults(found)
    if host.data.get("format") == "json":
        summary = {"healthy": not wrong, "wrong": wrong, "rollback": report.candidates(found)}
        print(json.dumps(summary | found, indent=2))
    else:
        print(report.table(found, wrong))
    sys.exit(1 if wrong else 0)
