"""What outsiders get, and what insiders must not: ports, rules that would lock us out."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from group_data import all as knobs
from tasks import registry_access
from tests.lab import hosts, outside
from tests.load import Load

ADDRESSES = {name: data["address"] for name, data in hosts.HOSTS.items()}
WORKER, PROXY = hosts.names("workers")[0], hosts.names("proxies")[0]
FIREWALL = "/usr/local/sbin/hashistack-firewall"
RULES = "/etc/hashistack/firewall.nft"
DENIED = "unauthorized|authentication required"


@pytest.fixture(scope="module")
def found() -> dict[str, set[int]]:
    """Host -> its TCP ports that an outsider can connect to."""
    with ThreadPoolExecutor(len(ADDRESSES)) as pool:
        return dict(zip(ADDRESSES, pool.map(outside.open_ports, ADDRESSES.values()), strict=True))


@pytest.mark.parametrize("name", hosts.names("workers"))
def test_an_outsider_finds_ssh_alone_on_a_worker(found: dict[str, set[int]], name: str) -> None:
    assert found[name] == {22}


@pytest.mark.parametrize("name", hosts.names("proxies"))
def test_an_outsider_finds_ssh_and_haproxy_on_a_proxy(found: dict[str, set[int]], name: str) -> None:
    assert found[name] == {22, knobs.haproxy_http_port, knobs.haproxy_https_port}


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize("port", [9, 8301])
def test_an_outsider_gets_no_answer_by_udp(name: str, port: int) -> None:
    assert not outside.says_closed(ADDRESSES[name], port)


@pytest.mark.parametrize("port", [knobs.registry_port, 4647, 8302])
def test_a_proxy_does_not_get_what_workers_get(port: int) -> None:
    assert connects(WORKER, "127.0.0.1", 22) and not connects(PROXY, ADDRESSES[WORKER], port)


@pytest.mark.parametrize("port", [knobs.registry_port, 8300])
def test_a_worker_does(port: int) -> None:
    assert connects(hosts.names("workers")[1], ADDRESSES[WORKER], port)


def connects(host: str, address: str, port: int) -> bool:
    answer = hosts.on(host, f"timeout 2 bash -c 'exec 3<>/dev/tcp/{address}/{port}' 2>&1 && echo yes", False)
    return answer.strip() == "yes"


def ssh_answers(host: str) -> bool:
    """Over a connection of its own, not the tests' common one."""
    alone = ["-o", "ControlPath=none", "-o", "ConnectTimeout=2"]
    done = subprocess.run(["ssh", "-F", str(hosts.SSH_CONFIG), *alone, host, "true"], capture_output=True)
    return done.returncode == 0


@pytest.mark.parametrize("path", ["/", "/v2/"])
def test_a_push_to_the_registry_that_docker_reads_is_refused(path: str) -> None:
    """It reads without TLS or a password, and nothing more."""
    begin = f"{path}{knobs.app_name}/blobs/uploads/" if path == "/v2/" else path
    request = rf"POST {begin} HTTP/1.0\r\nContent-Length: 0\r\n\r\n"
    at = f"/dev/tcp/127.0.0.1/{knobs.registry_port}"
    answer = hosts.on(WORKER, f"exec 3<>{at}; printf '{request}' >&3; head -n 1 <&3")
    assert answer.split()[1] == ("405" if path == "/v2/" else "200")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--tls-verify=false --no-creds", DENIED),
        (
            f"--cert-dir={registry_access.CLIENT} --creds=hashistack:guess",
            DENIED,
        ),
        (f"--authfile={registry_access.CLIENT}/config.json", "certificate signed by unknown authority"),
    ],
    ids=["nobody", "wrong password", "unknown CA"],
)
def test_the_registry_that_takes_pushes_asks_who_comes(arguments: str, why: str) -> None:
    image = f"docker://{ADDRESSES[WORKER]}:{knobs.registry_port}/{knobs.app_name}:{hosts.running_version()}"
    # Not from its own host, where Docker's folder of certificates is found by skopeo, too.
    asker = hosts.names("workers")[1]
    answer = hosts.on(asker, f"skopeo inspect --raw {arguments} {image} 2>&1", check=False)
    assert re.search(why, answer), answer


@pytest.mark.parametrize("unit", ["haproxy", "consul", "consul-template"])
def test_unit_is_sandboxed(unit: str) -> None:
    said = hosts.on(PROXY, f"systemd-analyze security --no-pager {unit} | tail -n 1")
    assert float(re.findall(r"\d+\.\d+", said)[0]) <= 3.0


def test_haproxy_runs_in_its_sandbox() -> None:
    """From its first start: nobody restarts it for a new one."""
    ask = "grep NoNewPrivs /proc/$(systemctl show -P MainPID haproxy)/status"
    assert hosts.on(PROXY, ask).split() == ["NoNewPrivs:", "1"]


CONTROL = "/run/anybody-can-read-this"


@pytest.mark.parametrize("name", ADDRESSES)
def test_no_secret_shows_on_a_host(name: str) -> None:
    """In no journal, no process's arguments, and no file that nobody can read but for one of ours."""
    secrets = [*hosts.settings.SECRETS.glob("token-*"), *hosts.settings.SECRETS.glob("gossip-*")]
    secrets.append(hosts.settings.SECRETS / "password-registry")
    patterns = "\n".join(["a-secret-for-this-test", *(file.read_text().strip() for file in secrets)])
    look = f"""
        (umask 077; cat >/run/patterns) <<'EOF'\n{patterns}\nEOF
        echo a-secret-for-this-test >{CONTROL}
        trap 'rm /run/patterns {CONTROL}' EXIT
        journalctl -q -o cat --no-pager | grep -cFf /run/patterns
        cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -cFf /run/patterns
        runuser -u nobody -- find /etc /home /run /tmp /usr/local /var -xdev -type f -size -1024k -readable \\
            2>/dev/null | xargs -d '\\n' grep -lFf /run/patterns"""
    assert hosts.on(name, look, check=False).split() == ["0", "0", CONTROL]


@pytest.mark.parametrize("package", knobs.base_upgrade_by_hand)
def test_upgrades_come_by_themselves_but_not_for_what_restarts(package: str) -> None:
    settings = hosts.on(PROXY, "apt-config dump")
    assert 'APT::Periodic::Unattended-Upgrade "1"' in settings
    assert f'Package-Blacklist:: "^{re.escape(package)}$"' in settings
    assert re.findall(r'Origins-Pattern:: "(.*)"', settings) == [
        "origin=Debian,codename=${distro_codename}-security,label=Debian-Security"
    ]


def test_rules_that_lock_us_out_are_taken_back_by_the_host_itself() -> None:
    """As after a controller that died between try and confirm."""
    before = hosts.on(PROXY, f"cat {RULES}")
    assert ssh_answers(PROXY)
    try:
        hosts.on(PROXY, f"sed -i '/tcp dport 22 accept/d' {RULES} && {FIREWALL} try 8")
        assert not ssh_answers(PROXY)
        hosts.wait_for("SSH to answer again", lambda: ssh_answers(PROXY), deadline_s=30)
    finally:
        hosts.on(PROXY, f"cat >{RULES} <<'EOF'\n{before}EOF")
    assert hosts.pyinfra("deploy.py", "--data=only=firewall").changed == {}


def test_deploy_takes_rules_back_that_lock_it_out() -> None:
    run = hosts.pyinfra("deploy.py", "--data=only=firewall", "--limit", PROXY, "--data=firewall_ssh_port=2")
    assert run.code != 0
    assert run.lines("the new firewall rules are taken back: no new SSH connection came through")
    assert ssh_answers(PROXY)
    assert hosts.pyinfra("deploy.py", "--data=only=firewall").code == 0
    assert hosts.pyinfra("deploy.py", "--data=only=firewall").changed == {}


def test_rules_come_and_go_under_load(load: Load) -> None:
    """Off, on, and loaded again some times: no request may notice."""
    for arguments in (["--data=firewall=false"], []):
        run = hosts.pyinfra("deploy.py", "--data=only=firewall", *arguments)
        assert run.code == 0, run.output
    for _ in range(5):
        hosts.on_all(list(ADDRESSES), "systemctl restart hashistack-firewall")
