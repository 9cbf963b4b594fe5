"""What a version may look like: MAJOR.MINOR.PATCH with an optional pre-release, as semver.org has it."""

from __future__ import annotations

import re

_NUMBER = r"(?:0|[1-9][0-9]*)"
_PRE = r"[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*"
_VERSION = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-{_PRE})?")
_EXAMPLE = "give three numbers: --data version=0.0.3"
_LONGEST = 100  # a Docker tag holds 128 characters, and names are made of it


def fault(version: object) -> str | None:
    """What is wrong with `--data version=...` in one line, or None. A missing one comes as None."""
    if version is None:
        return f"version: missing; {_EXAMPLE}"
    if not isinstance(version, str):
        return (
            f"version: arrives as the {type(version).__name__} {version}, since pyinfra turns what looks"
            f" like a number into one (1.10 into 1.1); {_EXAMPLE}"
        )
    if "+" in version:
        return f"version {version}: a Docker tag cannot hold build metadata (+...); {_EXAMPLE}"
    if not _VERSION.fullmatch(version) or len(version) > _LONGEST:
        return f"version {version}: not MAJOR.MINOR.PATCH or MAJOR.MINOR.PATCH-PRERELEASE; {_EXAMPLE}"
    return None
