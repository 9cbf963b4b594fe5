"""The app as a Nomad job: plan a version, register it, follow its deployment to the end.

The functions that get `api` (a python-nomad client) are the logic and know nothing of pyinfra. Those
after them find an agent to talk to, and another one when that host is lost on the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from nomad import Nomad
from nomad.api.exceptions import BaseNomadException, URLNotFoundNomadException
from pyinfra import host
from pyinfra.api import DeployError
from pyinfra.api.host import Host, HostData

from tasks import app_secrets, distribute, rolling, serving
from tasks.cluster import Unavailable, nomad_api, wait_until

# Stands for the image in a plan that is made before the image exists: placing does not look at it.
NO_DIGEST = "sha256:" + 64 * "0"
_REPLACED = "another release took its place"
# A lost server makes the others elect a leader; longer silence is an outage.
_SILENCE_S = 60
# Nomad counts a silent client as ready for 10-20 s.
_LOST_S = 30

_templates = Environment(
    loader=FileSystemLoader("templates"),
    undefined=StrictUndefined,
    autoescape=False,
    trim_blocks=True,
)


def render(data: HostData, version: str, digest: str) -> str:
    """The job's HCL, without the secrets' values. Raises DeployError if those cannot be had."""
    uid, _, gid = str(data.app_user).partition(":")
    return _templates.get_template("app/app.nomad.hcl.j2").render(
        data=data,
        version=version,
        digest=digest,
        secrets=app_secrets.stamp(data),
        variable=app_secrets.variable(data),
        as_file=app_secrets.as_file(data),
        uid=uid,
        gid=gid or uid,
    )


def plan(api: Nomad, hcl: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parsed job, and what Nomad would do with it. Nothing is changed."""
    job: dict[str, Any] = api.jobs.parse(hcl)
    return job, api.job.plan_job(job["ID"], {"Job": job}, diff=True)


def changes(planned: dict[str, Any]) -> bool:
    return bool(planned["Diff"]["Type"] != "None")


def unplaceable(failed: dict[str, Any] | None) -> str | None:
    """Why Nomad finds no node, from a plan's or an evaluation's FailedTGAllocs; None if it does."""
    reasons = []
    for metrics in (failed or {}).values():
        nodes = metrics["NodesEvaluated"]
        lacks = {
            **(metrics["ConstraintFiltered"] or {}),
            **{f"too little {what}": n for what, n in (metrics["DimensionExhausted"] or {}).items()},
        }
        reasons += [f"{reason} (on {count} of {nodes} nodes)" for reason, count in lacks.items()]
        if not lacks:
            reasons.append(f"none of {nodes} nodes is ready for it")
    return f"Nomad cannot place it: {', '.join(reasons)}" if reasons else None


def register(api: Nomad, job: dict[str, Any], planned: dict[str, Any]) -> int:
    """Register the job as planned; answers its version number. Raises if it changed since the plan."""
    api.jobs.register_job({"Job": job, "EnforceIndex": True, "JobModifyIndex": planned["JobModifyIndex"]})
    return _number(api, job["ID"])


def deployment_of(api: Nomad, job_id: str, number: int) -> dict[str, Any] | None:
    """The newest deployment of one version number of the job."""
    mine = [d for d in api.job.get_deployments(job_id) or [] if d["JobVersion"] == number]
    return max(mine, key=lambda d: int(d["CreateIndex"]), default=None)


def progress(deployment: dict[str, Any]) -> str:
    """One line: how far it is."""
    (group,) = deployment["TaskGroups"].values()
    if group["DesiredCanaries"] and not group["Promoted"]:
        line = f"canary: {group['HealthyAllocs']} of {group['DesiredCanaries']} healthy"
    else:
        line = f"{group['HealthyAllocs']} of {group['DesiredTotal']} instances healthy"
    if group["UnhealthyAllocs"]:
        line += f", {group['UnhealthyAllocs']} unhealthy"
    return line


def follow(
    api: Nomad,
    job_id: str,
    number: int,
    say: Callable[[str], Any],
    checks: Callable[[str, str], str] = lambda node, allocation_id: "",
    poll_s: float = 0.5,
) -> str | None:
    """Follow the deployment of a job version to its end; what went wrong, or None.

    An unhealthy instance ends it at once: Nomad alone would try until its progress deadline. `say`
    gets a line when something changes; `checks` answers what an instance's health checks say while
    they fail. May be called again for the same version after a broken call.
    """
    shown, since = "", time.monotonic()
    told: dict[str, str] = {}  # allocation -> its checks' last words: they end with it
    while True:
        evaluated = _evaluated(api, job_id)  # asked first: what it would start is there by then
        deployment = deployment_of(api, job_id, number)
        if deployment is None:
            if evaluated:
                return None  # nothing to start: Nomad makes no deployment
        else:
            line = progress(deployment)
            if line != shown:
                say(line)
                shown, since = line, time.monotonic()
            if deployment["Status"] == "successful":
                return None
            allocations = api.deployment.get_deployment_allocations(deployment["ID"])
            told |= {a["ID"]: checks(a["NodeName"], a["ID"]) for a in allocations if _undecided(a)}
            fault = _failed(api, deployment, unhealthy(api, allocations, told))
            if fault is None and time.monotonic() - since > _patience_s(deployment):
                fault = _not_placed(api, deployment) or f"no progress for {_patience_s(deployment):.0f} s"
            if fault:
                if deployment["Status"] == "running":
                    api.deployment.fail_deployment(deployment["ID"])
                return fault
        time.sleep(poll_s)


def _evaluated(api: Nomad, job_id: str) -> bool:
    return all(e["Status"] not in ("pending", "blocked") for e in api.job.get_evaluations(job_id))


def _undecided(allocation: dict[str, Any]) -> bool:
    decided = (allocation["DeploymentStatus"] or {}).get("Healthy") is not None
    return allocation["ClientStatus"] == "running" and not decided


def _patience_s(deployment: dict[str, Any]) -> float:
    """An instance that finds no node starts no deadline of Nomad's: ours is a little longer."""
    (group,) = deployment["TaskGroups"].values()
    return float(group["ProgressDeadline"] / 1e9 + 10)


def _failed(api: Nomad, deployment: dict[str, Any], sick: str | None) -> str | None:
    """Why the deployment has failed or must: another release, an unhealthy instance, Nomad's word."""
    if deployment["Status"] == "cancelled":
        return f"{_REPLACED} ({deployment['StatusDescription']})"
    if deployment["Status"] == "failed":
        return sick or _not_placed(api, deployment) or str(deployment["StatusDescription"])
    return sick


def _not_placed(api: Nomad, deployment: dict[str, Any]) -> str | None:
    failures = [
        evaluation["FailedTGAllocs"]
        for evaluation in api.job.get_evaluations(deployment["JobID"])
        if evaluation["FailedTGAllocs"] and evaluation["DeploymentID"] == deployment["ID"]
    ]
    return unplaceable(failures[0]) if failures else None


def unhealthy(api: Nomad, allocations: list[dict[str, Any]], told: dict[str, str]) -> str | None:
    """Where an instance is unhealthy, why, and its last words; None if none is.

    One on a node that no longer answers does not count: Nomad replaces it elsewhere.
    """
    for allocation in allocations:
        sick = (allocation["DeploymentStatus"] or {}).get("Healthy") is False
        if sick and _answers(api, allocation["NodeID"]):
            check = told.get(allocation["ID"]) if allocation["ClientStatus"] != "failed" else None
            words = [_events(allocation), check, _log(api, allocation)]
            return f"unhealthy on {allocation['NodeName']}: {'; '.join(filter(None, words))}"
    return None


def _answers(api: Nomad, node_id: str) -> bool:
    try:
        api.client.stats.read_stats(node_id)
    except BaseNomadException:
        return False
    return True


def _events(allocation: dict[str, Any]) -> str:
    """The last two different things that happened to the instance's task, as Nomad words them."""
    for task in (allocation["TaskStates"] or {}).values():
        told = [event["DisplayMessage"] for event in task["Events"] or []]
        worth = [line for line in dict.fromkeys(told) if not line.startswith(_ROUTINE)]
        return "; ".join((worth or told)[-2:])
    return str(allocation["ClientDescription"])


_ROUTINE = (
    "Unhealthy because of failed task",
    "Building Task Directory",
    "Task received",
    "Task restarting",
    "Task started",
    "Downloading image",
)


def _log(api: Nomad, allocation: dict[str, Any]) -> str:
    """The last lines that the instance wrote, errors first, or nothing if it never started."""
    for stream in ("stderr", "stdout"):
        try:
            text = api.client.stream_logs.stream(
                allocation["ID"],
                next(iter(allocation["TaskStates"])),
                stream,
                offset=2000,
                origin="end",
                plain=True,
            )
        except BaseNomadException:
            continue
        lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
        if lines:
            return f"its log ends: {' | '.join(lines[-3:])}"
    return ""


def restore(api: Nomad, job_id: str, number: int, say: Callable[[str], Any], poll_s: float = 0.5) -> str:
    """After a failure: wait until what Nomad went back to is stable. Answers how that went.

    The very first version has nothing to go back to: its job is removed, as before the release.
    """
    job = api.job.get_job(job_id)
    if job["Version"] == number:
        if any(version["Stable"] for version in api.job.get_versions(job_id)["Versions"]):
            return "Nomad has nothing else to go back to; release a version that is known to work"
        api.job.deregister_job(job_id, purge=True)
        return "no version has ever been healthy, so the job is removed"
    old = job["Meta"]["version"]
    say(f"failed; going back to {old}")
    fault = follow(api, job_id, job["Version"], lambda line: say(f"back to {old}: {line}"), poll_s=poll_s)
    return f"going back to {old} failed too: {fault}" if fault else f"{old} serves as before"


# pyinfra's side


def check(version: str) -> None:
    """In prepare, before anything is built: Nomad would take this job and has room for it."""
    with _refusing("Nomad"), nomad_api(_agent()) as api:
        _, planned = plan(api, _hcl(version))
        fault = unplaceable(planned["FailedTGAllocs"])
    if fault:
        raise DeployError(f"{version}: {fault}; change app_count, its resources or the nodes")


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except Unavailable as error:
        raise DeployError(f"{host.name}: {what}: {distribute.said(error)}; run deploy.py") from None


def _hcl(version: str) -> str:
    """Before its image exists, a version is planned with a stand-in for the digest."""
    return render(host.data, version, distribute.digest_of(version) or NO_DIGEST)


def _agent() -> Host:
    """A worker of this run whose agent answers and knows a leader."""
    error: Exception = OSError("no worker takes part in this run")
    for member in rolling.members("workers"):
        try:
            with nomad_api(member) as api:
                api.status.leader.get_leader()
            return member
        except Unavailable as lost:
            error = lost
    raise error


def _persist(step: Callable[[Nomad], str | None]) -> str | None:
    """Run `step`, again with another agent when its own is lost, until none answers for a minute."""
    silent = time.monotonic()
    while True:
        started = None
        try:
            member = _agent()
            started = time.monotonic()
            with nomad_api(member) as api:
                return step(api)
        except Unavailable as error:
            now = time.monotonic()
            if started and now - started > 10:
                silent = now
            if now - silent > _SILENCE_S:
                return f"Nomad does not answer ({distribute.said(error)}); run the same again to go on"
            time.sleep(1)


def settled(version: str) -> bool:
    """Nomad sees no difference, and no deployment of this version is under way or has failed."""
    try:
        with nomad_api(_agent()) as api:
            job, planned = plan(api, _hcl(version))
            if changes(planned):
                return False
            deployment = deployment_of(api, job["ID"], _number(api, job["ID"]))
            return not deployment or deployment["Status"] == "successful"
    except Unavailable:
        return False  # what is wrong is said when the release itself meets it


def release(version: str, say: Callable[[str], Any]) -> str | None:
    """Plan, register, follow; what went wrong, and what serves now, or None."""
    digest = distribute.digest_of(version)
    if not digest:
        return "neither a registry nor every worker's Docker holds it"
    differ = distribute.disagreement(distribute.digests(version))
    fault = differ or wait_until("Nomad", _strangers, _LOST_S, say)
    if fault:
        return fault
    with nomad_api(_agent()) as api:
        job, planned = plan(api, render(host.data, version, digest))
        fault = unplaceable(planned["FailedTGAllocs"])
        if fault:
            return f"{fault}; nothing was changed"
        app_secrets.store(api, host.data)
        # Without a difference an interrupted release is under way: it is followed.
        number = register(api, job, planned) if changes(planned) else _number(api, job["ID"])
    fault = _persist(lambda api: follow(api, job["ID"], number, say, serving.failing_checks))
    if fault is None or fault.startswith(_REPLACED):
        return fault
    end = _persist(lambda api: restore(api, job["ID"], number, say))
    return f"not released: {fault}; {end}"


def _number(api: Nomad, job_id: str) -> int:
    return int(api.job.get_job(job_id)["Version"])


def _strangers() -> str | None:
    """Nodes that Nomad would use although they are not in this run and so do not have the image."""
    taking_part = {member.name for member in rolling.members("workers")}
    with nomad_api(_agent()) as api:
        nodes = api.nodes.get_nodes()
    ready = {
        node["Name"]
        for node in nodes
        if node["Status"] == "ready" and node["SchedulingEligibility"] == "eligible"
    }
    names = ", ".join(sorted(ready - taking_part))
    if not names:
        return None
    return (
        f"{names}: Nomad would use it, but it is not in this run and lacks the image; take it in, or"
        " make it ineligible (nomad node eligibility -disable)"
    )


def stable_versions(member: Host | None = None) -> list[str]:
    """The app's versions that Nomad remembers as having become healthy, the newest first."""
    member = member or _agent()
    with nomad_api(member) as api:
        try:
            return stable(api.job.get_versions(member.data.app_name)["Versions"])
        except URLNotFoundNomadException:
            return []  # never released


def stable(versions: list[dict[str, Any]]) -> list[str]:
    """From Nomad's answer: each version of the app once, at its newest place."""
    newest = sorted(versions, key=lambda v: int(v["Version"]), reverse=True)
    return list(dict.fromkeys(v["Meta"]["version"] for v in newest if v["Stable"]))
