"""The frame of the fault tests: each leaves the hosts whole, and all of them the version that they found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import hosts
from tests.lab.conftest import put_back, pytest_runtest_makereport

__all__ = ["pytest_runtest_makereport"]


@pytest.fixture(scope="session")
def first_version() -> Iterator[str]:
    """A row with a release leaves what it released: to go back each time would take twice as long."""
    version = hosts.running_version()
    yield version
    if hosts.running_version() != version:
        run = hosts.pyinfra("release.py", "--data", f"version={version}")
        assert run.code == 0, run.output


@pytest.fixture
def running(request: pytest.FixtureRequest, first_version: str) -> Iterator[str]:
    """The version that runs. After a failed test the hosts are put back."""
    yield hosts.running_version()
    if request.node.user_properties:
        put_back(first_version)
