"""One search at a time in a folder: a lock that ends with its process, and a note of who holds it.

The lock is the system's (`flock`), which NFS passes on to other hosts and mounted buckets do not. So the holder also
renews its note every few seconds, and another host's note is believed until it has not been renewed for a minute.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shoal.files import write_text

RENEW_EVERY_S, STALE_AFTER_S = 10.0, 60.0


@contextmanager
def hold(root: Path) -> Iterator[None]:
    """Nobody else works in the folder, which is made, while the block runs. Raises ValueError that names who does."""
    root.mkdir(parents=True, exist_ok=True)
    note = root / "lock.json"
    with (root / "lock").open("a") as file:  # never deleted: another process may have opened it already
        _take(file, note)
        with _renewing(note):
            yield


def _take(file: IO[str], note: Path) -> None:
    """Locks the file and leaves a note. The lock goes when the file is closed, however its process ends."""
    held, is_locked = _read(note), True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(_explain(note.parent, held)) from error
    except OSError:  # a file system without locks: the note alone has to do
        is_locked = False
    host = socket.gethostname()
    was_killed = is_locked and held.get("host") == host  # on this host, a lock tells the truth
    if held and not was_killed and _age(note) < STALE_AFTER_S:
        raise ValueError(_explain(note.parent, held))
    write_text(note, json.dumps({"pid": os.getpid(), "host": host, "since": time.strftime("%F %T %Z")}))


@contextmanager
def _renewing(note: Path) -> Iterator[None]:
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_EVERY_S):
            with contextlib.suppress(OSError):  # storage that fails for a moment is told by whoever needs it
                os.utime(note)

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        note.unlink(missing_ok=True)


def _read(note: Path) -> dict[str, object]:
    """Who holds the folder, empty if nobody says so."""
    try:
        held = json.loads(note.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return held if isinstance(held, dict) and held.keys() >= {"pid", "host", "since"} else {}


def _age(note: Path) -> float:
    """Seconds since the note was renewed, by the clock of the storage: hosts' clocks differ."""
    probe = note.with_name(f".lock-{os.getpid()}")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink(missing_ok=True)
    with note.open() as file:  # opened, because a network's file system looks again then
        return now - os.fstat(file.fileno()).st_mtime


def _explain(root: Path, holder: dict[str, object]) -> str:
    who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}" if holder else "another process"
    return (
        f"{str(root)!r} is in use by {who}: wait for it, stop it (the same command then goes on from there), "
        f"or choose another name; of a process that is gone nothing is left after {STALE_AFTER_S:.0f} s"
    )
