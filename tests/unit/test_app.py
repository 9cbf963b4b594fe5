"""What the app's files must agree on with the rest of the stack."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from group_data import all as knobs

APP = Path(__file__).resolve().parents[2] / "app"
GUNICORN = runpy.run_path(str(APP / "gunicorn.conf.py"))
DOCKERFILE = (APP / "Dockerfile").read_text()


def test_gunicorn_ends_before_the_scheduler_kills_it() -> None:
    assert GUNICORN["graceful_timeout"] < knobs.app_kill_timeout_s <= 30


def test_gunicorn_listens_on_the_port_that_the_job_maps() -> None:
    assert GUNICORN["bind"] == f"0.0.0.0:{knobs.app_port}"


def test_gunicorn_writes_nowhere_but_in_memory() -> None:
    assert GUNICORN["worker_tmp_dir"] == "/dev/shm"
    assert GUNICORN["control_socket_disable"]


def test_the_image_is_built_on_the_base_of_the_lab_and_not_run_by_root() -> None:
    assert f"ARG BASE_IMAGE={knobs.app_base_image}\n" in DOCKERFILE
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", DOCKERFILE, re.MULTILINE)
    assert re.search(r"^CMD \[", DOCKERFILE, re.MULTILINE)


def test_every_requirement_is_pinned_with_hashes() -> None:
    lines = (APP / "requirements.txt").read_text().replace("\\\n", "").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert all(re.match(r"[\w-]+==[\w.]+ +--hash=sha256:[0-9a-f]{64}", pin) for pin in pins)


def test_requirements_in_names_what_requirements_txt_pins() -> None:
    pinned = (APP / "requirements.txt").read_text()
    wanted = (APP / "requirements.in").read_text().splitlines()
    assert all(f"{line} " in pinned for line in wanted if line and not line.startswith("#"))
