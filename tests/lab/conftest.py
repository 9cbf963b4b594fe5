"""The end-to-end tests' frame: each leaves the lab as it found it, even when it fails."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.lab import hosts
from tests.load import Load


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell `as_found` how the test ended."""
    report = yield
    if report.failed:
        item.user_properties.append(("failed", report.when))
    return report


@pytest.fixture
def as_found(request: pytest.FixtureRequest) -> Iterator[str]:
    """The version that runs; after a failed test the hosts, their settings and this version are put back."""
    version = hosts.running_version()
    yield version
    if request.node.user_properties:
        put_back(version)
    assert hosts.running_version() == version


def put_back(version: str) -> None:
    """The hosts on, their settings as they should be, this version running."""
    if hosts.SETTINGS.provider == "docker":
        hosts.power_on(*hosts.HOSTS)
    for script in (["deploy.py"], ["release.py", "--data", f"version={version}"]):
        run = hosts.pyinfra(*script)
        print(f"putting the lab back: {' '.join(script)}: exit code {run.code}\n{run.output[-2000:]}")


@pytest.fixture
def load(as_found: str) -> Iterator[Load]:
    """Load on the app until the test ends: each request must be answered, by a version in `load.versions`."""
    with Load(hosts.URL, rate=120, versions=[as_found]) as load:
        yield load
    print(load.result)
    assert load.result.ok
    assert not load.result.failed
