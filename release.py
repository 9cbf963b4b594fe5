"""Put a version of the app into service: pyinfra inventory.py release.py --data version=0.0.3

Build it (once per version), bring the image to every worker, replace the instances one by one, and
see that exactly the new version serves. What fails leaves the old version serving and exits non-zero.
"""

from pyinfra import host

from tasks import app, containers, distribute, nomad_job, preflight, rolling, serving

version = app.wanted_version()
preflight.check_hosts()
scheduler = nomad_job if host.data.scheduler == "nomad" else containers
if host.name == rolling.members("workers")[0].name:
    app.check(version)
    scheduler.check(version)

preflight.stop_at_first_failure(name="Stop at the first failure")
if "builder" in host.groups:
    distribute.build(name=f"Build the image of {version}", version=version)

# A worker that is lost while images travel does not end the release: the others get it.
preflight.go_on_without_failed(name="Go on without a worker that is lost")
if "workers" in host.groups:
    distribute.copy(name=f"Copy {version} to each registry", version=version)
    distribute.pull(name=f"Pull {version} on each worker", version=version)

preflight.stop_at_first_failure(name="Stop at the first failure from here on")
if "workers" in host.groups:
    scheduler.roll(name=f"Roll {version} out", version=version)
if "proxies" in host.groups:
    rolling.wait_until_healthy(
        name=f"Check that exactly {version} serves",
        what=f"{version}",
        fault=serving.exactly(version, host.data.app_count),
    )
