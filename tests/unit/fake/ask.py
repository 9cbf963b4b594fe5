"""Ask both APIs through pyinfra's own SSH connection, often enough to see a leak; print what they say."""

import json

from pyinfra import host

from tasks import cluster

for _ in range(20):
    with cluster.consul_api(host) as consul:
        leader = consul.status.leader()
    with cluster.nomad_api(host) as nomad:
        region = nomad.regions.get_regions()
with cluster.forward(host, host.data.closed_port) as port, cluster.http_session() as http:
    try:
        http.get(f"http://127.0.0.1:{port}", timeout=cluster.TIMEOUT_S)
        refused = False
    except cluster.Unavailable:
        refused = True
print(json.dumps({"leader": leader, "regions": region, "refused": refused}))
