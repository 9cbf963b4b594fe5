"""What a version may look like: MAJOR.MINOR.PATCH with an optional pre-release, as semver.org has it."""

from __future__ import annotations

import re

_NUMBER = r"(?:0|[1-9][0-9]*)"
_PRE = r"[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*"
_VERSION = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-{_PRE})?")
_LONGEST = 100  # a Docker tag holds 128 characters, and names are made of it


def fault(version: object, knob: str = "version") -> str | None:
    """What is wrong with `--data version=...` in one line, or None. A missing one comes as None."""
    example = f"give three numbers: --data {knob}=0.0.3"
    if version is None:
        return f"{knob}: missing; {example}"
    if not isinstance(version, str):
        return (
            f"{knob}: arrives as the {type(version).__name__} {version}, since pyinfra turns what looks"
            f" like a number into one (1.10 into 1.1); {example}"
        )
    if "+" in version:
        return f"{knob} {version}: a Docker tag cannot hold build metadata (+...); {example}"
    if not _VERSION.fullmatch(version) or len(version) > _LONGEST:
        return f"{knob} {version}: not MAJOR.MINOR.PATCH or MAJOR.MINOR.PATCH-PRERELEASE; {example}"
    return None
