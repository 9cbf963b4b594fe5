"""Back to the version before: pyinfra -y inventory.py rollback.py [--data to=0.0.2]

Nothing is built or copied: every worker still holds the image. The way back is the same as the way
there: one instance after the other, health-gated; what serves now serves on if it fails.
"""

from pyinfra import host, logger

from tasks import app, cluster, distribute, history, lock, preflight, rollback, rolling

preflight.check_hosts()
cluster.act_as("release", host.data)
distribute.notice_loss()
version = rollback.wanted_version()
if rolling.driver():
    logger.info(f"back to {version}")

preflight.stop_at_first_failure(name="Stop at the first failure")
lock.hold(name="Let no other run begin", what=f"rollback to {version}")
history.begin(
    name="Note the rollback in the audit trail",
    action="rollback",
    version=version,
    settled=app.settled,
    digest_of=distribute.digest_of,
)
app.put_into_service(version)
