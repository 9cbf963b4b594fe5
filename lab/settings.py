"""What `make up` chose, remembered in .lab.json so that plain pyinfra and vagrant agree with it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / ".lab.json"


@dataclass
class Settings:
    """The lab's shape. `data` is pyinfra host data (scheduler, versions): it wins over group_data."""

    workers: int = 3
    proxies: int = 1
    provider: str = "docker"
    http_port: int = 8080
    data: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        FILE.write_text(json.dumps(asdict(self), indent=2) + "\n")


def load() -> Settings:
    """The remembered settings, or the defaults above when no lab was made yet."""
    return Settings(**json.loads(FILE.read_text())) if FILE.exists() else Settings()
