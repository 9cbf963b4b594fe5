"""Every knob, by role. A knob changes here, in a group's own file, in inventory.py, or by --data."""

_sudo = True  # pyinfra logs in as an ordinary user

# What runs the app: "nomad", or "docker" (pyinfra itself rolls the app's containers).
scheduler = "nomad"

# Roles to run: --data only=haproxy,dns. Empty: all.
only = ""
# Stop a server although the cluster cannot spare one: --data accept_outage=true.
accept_outage = False

# Encrypt, authenticate and authorise everything. False: only for a lab that is thrown away.
secure = True
# Keys, tokens and certificates, on the controller; a relative path begins at the project. Back it up.
secrets_folder = "secrets"

# Versions, and where their zips come from (tasks/mirror.py). "" = the publisher's site.
artifact_mirror = ""
# Consul: 1.22 is out of support, and 2.0.4 drops idle RPC streams (hashicorp/consul#23923).
consul_version = "2.0.3"
consul_template_version = "0.43.0"
nomad_version = "2.0.5"

# How long a restarted member may take to recover, and a gate to open, in seconds.
roll_deadline_s = 180

# base
base_packages = ["ca-certificates", "dnsmasq-base", "systemd-timesyncd"]
base_sysctl = {
    "net.core.somaxconn": 4096,  # HAProxy's listen backlog
}
base_journal_max = "200M"

# consul
consul_datacenter = "dc1"
consul_http_address = "127.0.0.1"
consul_http_port = 8500
consul_https_port = 8501
consul_dns_port = 8600
consul_raft_multiplier = 1  # 1 = production timing, 5 = for slow machines

# docker
docker_packages = ["docker.io", "iptables", "skopeo"]
docker_bip = "172.26.0.1/16"  # the bridge; must not overlap a network that the hosts are on
docker_address_pool = "172.27.0.0/16"
docker_log_max_size = "10m"
docker_log_max_file = 3

# nomad
nomad_region = "global"
nomad_http_address = "127.0.0.1"
nomad_http_port = 4646
nomad_reserved_cpu_mhz = 200
nomad_reserved_memory_mb = 256
nomad_failover_heartbeat_ttl = "30s"  # a new leader takes a client for lost after this long
nomad_pids_limit = 512  # of a container whose job names no limit
nomad_image_delay = "720h"  # images of old versions stay this long for a rollback

# registry
registry_port = 5000
registry_image = "hashistack/registry:2"

# haproxy
haproxy_packages = ["haproxy", "socat"]
haproxy_bind = "*"
haproxy_http_port = 8080
haproxy_stats_port = 8404
haproxy_maxconn = 2000
haproxy_timeout = "60s"  # the longest silence of a client or of an instance

# keepalived: with two proxies, one of them holds this free address of their network. "" = no keepalived.
haproxy_vip = ""
keepalived_packages = ["keepalived"]
keepalived_router_id = 56  # 1 to 255; another one for each pair in a network

# app
app_name = "app"
app_folder = "app"
app_first_version = "0.0.2"
app_count = 3
app_health_path = "/status"
app_port = 8000
app_env: dict[str, str] = {}
# Names of secrets; their values are lines NAME=value of app.env in secrets_folder.
app_secrets: list[str] = []
app_secrets_as = "environment"  # or "file": /secrets/app.env, which `docker inspect` does not show
app_user = "10001:10001"  # numbers, whatever the image says; never root
app_cpu_mhz = 100
app_memory_mb = 128
app_base_image = "hashistack/app-base:1"
app_pids_limit = 256
app_min_healthy_s = 10  # an instance must stay healthy for this long before the next one is replaced
app_healthy_deadline_s = 120  # and must have become so by then
app_shutdown_delay_s = 15
app_kill_timeout_s = 25

# docker scheduler: the two ports on a worker's private address between which a release moves the app
app_ports = [20001, 20002]
