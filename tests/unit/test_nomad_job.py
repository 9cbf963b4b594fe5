"""The app's job against answers recorded from Nomad 2.0.5 (nomad/*.json, cut to what is read).

Each file holds, by request, what a real agent answered during one release, in order, and how often.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import nomad
import pytest
import requests
from pyinfra.api.host import HostData

from group_data import all as knobs
from tasks import distribute, nomad_job, secrets, serving

RECORDED = Path(__file__).parent / "nomad"
DIGEST = "sha256:" + 64 * "a"


class Replay:
    """In place of the client's HTTP session: gives the recorded answers; the last one stays."""

    def __init__(self, name: str) -> None:
        self.answers = json.loads((RECORDED / f"{name}.json").read_text())
        self.asked: list[str] = []
        self.get = self._answer("GET")
        self.post = self._answer("POST")
        self.delete = self._answer("DELETE")

    def _answer(self, method: str) -> Any:  # noqa: ANN401 - stands for requests' methods
        def answer(url: str, params: dict[str, str] | None = None, **rest: object) -> requests.Response:
            stream = f"?type={params['type']}" if params and "type" in params else ""
            request = f"{method} /{url.removeprefix('http://nomad/')}{stream}"
            self.asked.append(request)
            recorded = self.answers[request]
            recorded[0]["times"] -= 1
            response = requests.Response()
            response.status_code, body = recorded[0]["status"], recorded[0]["body"]
            response._content = (body if isinstance(body, str) else json.dumps(body)).encode()
            if recorded[0]["times"] == 0 and len(recorded) > 1:
                recorded.pop(0)
            return response

        return answer


def recorded(name: str) -> tuple[nomad.Nomad, Replay]:
    replay = Replay(name)
    return nomad.Nomad(address="http://nomad", session=replay), replay


def released(name: str) -> tuple[str | None, list[str], Replay]:
    """Plan, register and follow, as recorded: the fault, what was said, and what Nomad was asked."""
    api, replay = recorded(name)
    said: list[str] = []
    job, planned = nomad_job.plan(api, "")
    number = nomad_job.register(api, job, planned)
    checks = lambda node, allocation: "HTTP GET /status: 500"  # noqa: E731
    fault = nomad_job.follow(api, "app", number, said.append, checks, poll_s=0)
    if fault:
        fault += "; " + nomad_job.restore(api, "app", number, said.append, poll_s=0)
    return fault, said, replay


def test_a_good_version_is_followed_to_its_end() -> None:
    fault, said, _ = released("canary")
    assert fault is None
    assert said == ["canary: 0 of 1 healthy", "1 of 2 instances healthy", "2 of 2 instances healthy"]


def test_the_first_version_has_no_canary() -> None:
    fault, said, _ = released("first")
    assert (fault, said[-1]) == (None, "2 of 2 instances healthy")


def test_a_changed_count_is_followed_too() -> None:
    fault, said, _ = released("fewer")
    assert (fault, said[-1]) == (None, "1 of 1 instances healthy")


def test_a_crashing_version_is_ended_with_its_last_words_and_the_old_one_comes_back() -> None:
    fault, said, replay = released("crash")
    assert fault == (
        'unhealthy on worker-01: Exit Code: 3, Exit Message: "Docker container exited with non-zero exit'
        ' code: 3"; Exceeded allowed attempts 2 in interval 1m0s and mode is "fail"; its log ends:'
        " RuntimeError: no database configured; 0.4.0 serves as before"
    )
    assert said[1:3] == ["canary: 0 of 1 healthy, 1 unhealthy", "failed; going back to 0.4.0"]
    assert said[-1] == "back to 0.4.0: 2 of 2 instances healthy"
    assert sum("/deployment/fail/" in request for request in replay.asked) == 1


def test_a_version_that_never_gets_healthy_is_ended_with_what_its_check_says() -> None:
    fault, _, _ = released("sick")
    assert fault == (
        "unhealthy on worker-01: Task not running for min_healthy_time of 10s by healthy_deadline of 20s;"
        " HTTP GET /status: 500; its log ends: GET /status 500 cannot reach the database;"
        " 0.2.0 serves as before"
    )


def test_a_first_version_that_fails_leaves_no_job() -> None:
    fault, _, replay = released("first-crash")
    assert fault and fault.endswith("no version has ever been healthy, so the job is removed")
    assert replay.asked[-1] == "DELETE /v1/job/app"


def test_a_failed_job_is_kept_where_an_older_one_was_healthy() -> None:
    api, replay = recorded("first-crash")
    replay.answers["GET /v1/job/app/versions"][0]["body"]["Versions"].append({"Stable": True})
    number = api.job.get_job("app")["Version"]
    assert "nothing else to go back to" in nomad_job.restore(api, "app", number, print)
    assert not any(request.startswith("DELETE") for request in replay.asked)


def test_an_unhealthy_instance_on_a_lost_node_does_not_end_the_release() -> None:
    api, replay = recorded("crash")
    node = next(request for request in replay.answers if request.startswith("GET /v1/client/stats"))
    replay.answers[node] = [{"times": 1, "status": 404, "body": "No path to node"}]
    allocations = replay.answers[next(r for r in replay.answers if r.startswith("GET /v1/deployment/alloc"))]
    assert nomad_job.unhealthy(api, allocations[-1]["body"], {}) is None
    assert replay.asked == ["GET /v1/client/stats"]


def test_the_same_again_is_no_change() -> None:
    api, _ = recorded("same")
    _, planned = nomad_job.plan(api, "")
    assert not nomad_job.changes(planned)


def test_no_room_is_known_from_the_plan() -> None:
    api, replay = recorded("no-room")
    _, planned = nomad_job.plan(api, "")
    fault = nomad_job.unplaceable(planned["FailedTGAllocs"])
    assert fault == "Nomad cannot place it: too little memory (on 1 of 1 nodes)"
    assert "POST /v1/jobs" not in replay.asked


def test_a_job_that_changed_since_the_plan_is_not_registered() -> None:
    api, _ = recorded("conflict")
    with pytest.raises(nomad.api.exceptions.BaseNomadException) as raised:
        nomad_job.register(api, {"ID": "app"}, {"JobModifyIndex": 999})
    assert distribute.said(raised.value) == "Enforcing job modify index 999: job does not exist"


def test_failing_checks_are_those_of_the_allocation() -> None:
    def check(allocation: str, status: str, output: str) -> dict[str, str]:
        return {"ServiceID": f"_nomad-task-{allocation}-http", "Status": status, "Output": output}

    checks = {
        "1": check("a1", "critical", "HTTP GET http://x/status: 503 Service Unavailable Output: \n"),
        "2": check("a1", "passing", "fine"),
        "3": check("b2", "critical", "refused"),
    }
    assert serving.failures(checks, "a1") == "HTTP GET http://x/status: 503 Service Unavailable"


# The template


def data(**changed: object) -> HostData:
    return cast("HostData", SimpleNamespace(**{**vars(knobs), **changed}))


@pytest.fixture(scope="session")
def nomad_binary() -> str:
    found = shutil.which("nomad")
    if not found:
        pytest.skip("no nomad on this machine: the job's HCL is not parsed")
    return found


@pytest.mark.parametrize(
    "env", [{}, {"GREETING": 'say "hi" <&>', "empty": "", "N": 3}], ids=["plain", "environment"]
)
def test_nomad_parses_the_job(nomad_binary: str, env: dict[str, object], tmp_path: Path) -> None:
    hcl = tmp_path / "app.nomad.hcl"
    hcl.write_text(nomad_job.render(data(app_env=env), "0.0.3", DIGEST))
    ran = subprocess.run([nomad_binary, "job", "run", "-output", str(hcl)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    job = json.loads(ran.stdout)["Job"]
    (group,) = job["TaskGroups"]
    (task,) = group["Tasks"]
    assert job["Meta"] == {"version": "0.0.3"}
    assert group["Services"][0]["Tags"] == ["version-0.0.3"]
    assert task["Config"]["image"] == f"127.0.0.1:5000/app@{DIGEST}"
    assert task["Env"] == {"APP_VERSION": "0.0.3"} | {name: str(value) for name, value in env.items()}


@pytest.mark.parametrize("form", ["environment", "file"])
def test_the_job_names_its_secrets_but_does_not_have_them(
    nomad_binary: str, form: str, tmp_path: Path
) -> None:
    secrets.write(tmp_path, "app.env", "KEY=marker")
    mine = data(secrets_folder=str(tmp_path), app_secrets=["KEY"], app_secrets_as=form)
    hcl = tmp_path / "app.nomad.hcl"
    hcl.write_text(nomad_job.render(mine, "0.0.3", DIGEST))
    ran = subprocess.run([nomad_binary, "job", "run", "-output", str(hcl)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "marker" not in ran.stdout
    job = json.loads(ran.stdout)["Job"]
    (template,) = job["TaskGroups"][0]["Tasks"][0]["Templates"]
    stamp = job["Meta"]["secrets"]
    assert (
        template["EmbeddedTmpl"] == f'{{{{ with nomadVar "nomad/jobs/app" }}}}{{{{ .{stamp} }}}}{{{{ end }}}}'
    )
    assert (template["Envvars"], template["Perms"], template["Uid"]) == (form == "environment", "0400", 10001)
    assert template["ChangeMode"] == "noop"  # a restart would take all instances at once


def test_the_deadlines_fit_into_each_other() -> None:
    """A progress deadline must exceed the healthy deadline, and a stop must fit Nomad's 30 s."""
    hcl = nomad_job.render(data(app_healthy_deadline_s=20), "0.0.3", DIGEST)
    assert 'healthy_deadline  = "20s"' in hcl and 'progress_deadline = "100s"' in hcl
    assert knobs.app_kill_timeout_s <= 30
