"""What may be released: asked in prepare, refused in one line before anything changes."""

from __future__ import annotations

from pathlib import Path

from pyinfra import host, logger
from pyinfra.api import DeployError

from tasks import cluster, distribute, image, rolling, serving
from tasks import version as versions


def wanted_version() -> str:
    """The version of `--data version=...`."""
    version = host.data.get("version")
    fault = versions.fault(version)
    if fault:
        raise DeployError(fault)
    return str(version)


def check(version: str) -> None:
    """Registries answer and agree, and the version is either new or that of its image.

    Reads only. Call it on one worker.
    """
    for member in rolling.members("workers"):
        try:
            distribute.digest(member, version)
        except cluster.Unavailable as error:
            raise DeployError(
                f"{member.name}: its registry does not answer ({error}); run deploy.py,"
                f" or go on without: --exclude {member.name}"
            ) from None
    fault = distribute.disagreement(version)
    if fault:
        raise DeployError(f"{fault}; delete the wrong one from its registry")
    origin = distribute.origin(version)
    if origin is None:
        _check_builder(version)
    else:
        _check_source(version, distribute.source(origin, version))


def _check_builder(version: str) -> None:
    if not rolling.members("builder"):
        raise DeployError(f"{version}: was never released, and no builder takes part in this run")
    if not (Path(host.data.app_folder) / "Dockerfile").is_file():
        raise DeployError(f"app_folder={host.data.app_folder}: no Dockerfile there")


def _check_source(version: str, built_from: str) -> None:
    """A version is built once. Its image is used again, but never passed off as newer source."""
    if image.source_hash(Path(host.data.app_folder)) == built_from:
        return
    try:
        running = version in serving.running_versions()
    except cluster.Unavailable as error:
        raise DeployError(f"{host.name}: Consul does not answer ({error}); see status.py") from None
    if running:
        raise DeployError(
            f"{version}: runs already and {host.data.app_folder}/ has changed since it was built;"
            " choose a new version"
        )
    logger.warning(f"{version}: released before from other source; its existing image is used")
