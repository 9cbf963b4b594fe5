"""The README's table of knobs is what group_data has."""

import re
from pathlib import Path

import pytest

from group_data import all as knobs

README = (Path(__file__).parents[2] / "README.md").read_text()
ROWS = dict(re.findall(r"^\| `(\w+)` \| `?(.+?)`? \|", README.partition("## Knobs")[2], re.M))
NAMES = [name for name in vars(knobs) if not name.startswith("__")]


@pytest.mark.parametrize("name", NAMES)
def test_a_knob_stands_there_with_its_value(name: str) -> None:
    value = getattr(knobs, name)
    if isinstance(value, str | int | float) and value != "":
        assert ROWS[name] == str(value)
    else:
        assert name in ROWS


def test_nothing_else_does() -> None:
    assert ROWS.keys() <= set(NAMES)
