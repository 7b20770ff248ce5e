"""Files and folders that are whole or not there: written aside, renamed last."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """A place to write a file or folder to; it becomes `path` if the block ends well, and is removed if not."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield aside
        aside.rename(path)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text in one step."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
