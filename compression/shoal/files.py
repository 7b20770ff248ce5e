"""Files and folders that are whole or not there: written aside, renamed last."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_path(path: Path | str, what: str) -> None:
    """Raises ValueError for a URI, which would be taken for a relative path: `s3://b/r` for the folder `b/r` in `s3:`."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        uri = re.sub(":/+", "://", str(path), count=1)  # a Path has lost a slash
        raise ValueError(
            f"{what} {uri!r} is a URI, and Shoal reads and writes files; mount it (NFS, a mounted bucket) or copy it, "
            "and give the path"
        )


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """A place to write a file or folder to; it becomes `path` if the block ends well, and is removed if not."""
    require_path(path, "path")
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


def write_once(path: Path, text: str) -> bool:
    """Writes a file unless it is there; returns whether it did. Of several writers, one does."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.write_text(text, encoding="utf-8")
        try:
            os.link(aside, path)  # unlike a rename, never in the place of another file
        except FileExistsError:
            return False
        except OSError:  # mounted buckets have no links
            if path.exists():
                return False
            aside.rename(path)
        return True
    finally:
        aside.unlink(missing_ok=True)
