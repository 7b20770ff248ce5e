"""How far a trial is, told through a file: who asks needs no connection."""

from __future__ import annotations

import json
import time
from pathlib import Path

from shoal.files import write_text


class ProgressFile:
    """A listener that writes (stage, done, total) to a file, at most twice a second: readers need no connection."""

    def __init__(self, path: Path):
        self.path = path
        self.written_at, self.stage = 0.0, ""
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage or done >= total or now - self.written_at > 0.5:
            self.written_at, self.stage = now, stage
            write_text(self.path, json.dumps({"stage": stage, "done": done, "total": total}))


def read_progress(path: Path) -> tuple[str, int, int] | None:
    """What a `ProgressFile` last wrote, None before that."""
    try:
        progress = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return progress["stage"], progress["done"], progress["total"]
