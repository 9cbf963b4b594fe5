"""Releases under load: none loses a request, and one that fails leaves the version before serving."""

from __future__ import annotations

import hashlib
import json
import re
import secrets as random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from group_data import all as knobs
from lab import settings
from tasks import secrets
from tests.lab import hosts
from tests.load import Load

# The same version in another shape. The docker scheduler always runs one instance on each worker.
RESHAPED = (
    f"app_count={knobs.app_count + 1}"
    if hosts.SCHEDULER == "nomad"
    else f"app_memory_mb={knobs.app_memory_mb + 1}"
)
SICK = {
    # gunicorn cannot load it, says why, and exits.
    "crash": (
        "app = Flask(__name__)",
        'raise SystemExit("no database: giving up")',
        "no database: giving up",
    ),
    # It runs, but never says that it is well.
    "mute": ('_plain("OK\\n")', 'Response("warming up", 503)', "503 Service Unavailable|Booting worker"),
}


def release(version: str, *arguments: str) -> hosts.Run:
    return hosts.pyinfra("release.py", "--data", f"version={version}", *arguments)


def test_release_and_back(load: Load, as_found: str) -> None:
    """To another version, the same again, the same reshaped, and back."""
    other = "0.0.3" if as_found != "0.0.3" else "0.0.2"
    load.versions = frozenset({as_found, other})

    run = release(other)
    assert run.code == 0, run.output
    assert versions_that_serve() == {other}

    run = release(other)
    assert (run.code, run.changed) == (0, {}), run.output
    assert run.lines("nothing to do")

    with app_secret() as (name, value):
        run = release(other, "--data", RESHAPED, "--data", f"app_secrets={name}")
    assert run.code == 0, run.output
    assert list(run.changed) == [f"Replace what runs by {other}"], run.output
    assert versions_that_serve() == {other}
    assert all(value in environment for environment in hosts.on_all(WORKERS, ENVIRONMENT).values())
    assert value not in run.output
    if hosts.SCHEDULER == "nomad":
        assert value not in json.dumps(hosts.api(WORKERS[0], knobs.nomad_http_port, "/v1/job/app"))
    if hosts.SCHEDULER == "nomad":
        assert len(hosts.haproxy_servers()) == knobs.app_count + 1

    run = release(as_found)
    assert run.code == 0, run.output
    assert not run.lines("building")
    assert versions_that_serve() == {as_found}


WORKERS = hosts.names("workers")
# Of the app's processes on a worker.
ENVIRONMENT = "for p in $(pgrep -f '[g]unicorn app:app'); do tr '\\0' '\\n' < /proc/$p/environ; done"


@contextmanager
def app_secret() -> Iterator[tuple[str, str]]:
    """The name of a secret, for app_secrets, and its value."""
    file = settings.SECRETS / "app.env"
    kept = file.read_text() if file.exists() else None
    name, value = "LAB_SECRET", f'it\'s "{random.token_hex()}" $HOME'
    secrets.write(file.parent, file.name, f"{name}={value}")
    yield name, value
    if kept is None:
        file.unlink()
    else:
        secrets.write(file.parent, file.name, kept)


def versions_that_serve() -> set[str]:
    """The versions of HAProxy's servers, at once: a release that has ended has moved all of them."""
    servers = hosts.serving()
    assert servers, f"HAProxy {hosts.haproxy_servers()}, Consul {hosts.consul_instances()}"
    return {match[1] for name in servers if (match := re.match(r"app-(.+)-[0-9.]+-\d+$", name))}


@pytest.mark.parametrize("kind", SICK)
def test_sick_version_leaves_the_old_one(load: Load, as_found: str, kind: str, tmp_path: Path) -> None:
    before = hosts.consul_instances()
    source, sick, reason = SICK[kind]
    folder = copy_of_app(tmp_path, source, sick)
    # Named after what it is: a version stays in the registries, where later runs find it again.
    name = f"0.1.0-{kind}.h{hashlib.sha256((folder / 'app.py').read_bytes()).hexdigest()[:8]}"

    run = release(name, "--data", f"app_folder={folder}", "--data", "app_healthy_deadline_s=12")
    assert run.code == 1
    assert "Traceback" not in run.output
    assert run.lines(rf"{re.escape(name)}.*({reason})") or run.lines(reason), run.output
    hosts.wait_for("the old instances alone to serve", lambda: hosts.serving() == before)


def copy_of_app(target: Path, old: str, new: str) -> Path:
    """The app's folder with one change."""
    folder = shutil.copytree(hosts.ROOT / knobs.app_folder, target / "app")
    source = (folder / "app.py").read_text()
    assert old in source
    (folder / "app.py").write_text(source.replace(old, new))
    return folder
