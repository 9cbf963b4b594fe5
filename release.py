"""Put a version of the app into service: pyinfra inventory.py release.py --data version=0.0.3

Build it (once per version), bring the image to every worker, replace the instances one by one, and
see that exactly the new version serves. What fails leaves the old version serving and exits non-zero.
"""

from pyinfra import host

from tasks import app, cluster, distribute, history, lock, preflight, prune, rolling

version = app.wanted_version()
preflight.check_hosts()
preflight.check_workers()
cluster.act_as("release", host.data)
distribute.notice_loss()
if rolling.leads("workers"):
    app.check(version)
    prune.check()

preflight.stop_at_first_failure(name="Stop at the first failure")
lock.hold(name="Let no other run begin", what=f"release {version}")
history.begin(
    name="Note the release in the audit trail",
    action="release",
    version=version,
    settled=app.settled,
    digest_of=distribute.digest_of,
)
if "workers" in host.groups:
    distribute.build(name=f"Build the image of {version}", version=version)

distribute.go_on_without_the_lost(name="Go on without a worker that is lost from here on")
if "workers" in host.groups:
    distribute.copy(name=f"Copy {version} to each registry", version=version)
    distribute.pull(name=f"Pull {version} on each worker", version=version)

preflight.stop_at_first_failure(name="Stop at the first failure again")
app.put_into_service(version)
if "workers" in host.groups:
    prune.prune(name="Delete the versions that are not needed any more")
app.finish(version)
