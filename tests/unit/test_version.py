"""Which versions are taken, and the one line that the others get."""

import pytest

from tasks import version


@pytest.mark.parametrize("good", ["0.0.3", "1.10.0", "10.20.30", "1.0.0-rc.1", "1.0.0-0A-x.9"])
def test_a_version_is_three_numbers_and_maybe_a_pre_release(good: str) -> None:
    assert version.fault(good) is None


@pytest.mark.parametrize(
    "bad",
    [
        *(
            "1",
            "1.2",
            "1.2.3.4",
            "v1.2.3",
            "01.2.3",
            "1.2.3-",
            "1.2.3-a..b",
            "1.2.3\n",
            "1.2.3 ",
            "latest",
            "",
        ),
        *("1.2.3;rm -rf /", "1.2.x", "-1.2.3", "1.2.3-" + 100 * "x", "1.10"),
    ],
)
def test_anything_else_is_refused_in_one_line(bad: str) -> None:
    fault = version.fault(bad)
    assert fault and fault.endswith("--data version=0.0.3")
    assert "\n" not in fault.replace(bad, "")


def test_a_missing_one() -> None:
    assert version.fault(None) == "version: missing; give three numbers: --data version=0.0.3"


def test_build_metadata_is_refused_with_its_reason() -> None:
    assert "a Docker tag cannot hold build metadata" in (version.fault("1.2.3+4") or "")


@pytest.mark.parametrize(("value", "arrives"), [(1.1, "float 1.1"), (3, "int 3"), (True, "bool True")])
def test_what_pyinfra_turns_into_something_else_is_explained(value: object, arrives: str) -> None:
    """test_release.py types such a version on pyinfra's real command line."""
    fault = version.fault(value)
    assert fault and f"arrives as the {arrives}" in fault and "1.10 into 1.1" in fault
