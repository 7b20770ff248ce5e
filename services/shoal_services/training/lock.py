"""One search at a time in a folder: a lock that ends with its process, and a note of who holds it.

The lock is the system's (`flock`), which NFS passes on to other hosts and mounted buckets do not. So the holder also
renews its note every few seconds; another host waits for that, and after a minute without it the folder is free.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
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
def lock_folder(root: Path) -> Iterator[None]:
    """Nobody else works in the folder, which is made, while the block runs. Raises ValueError that names who does."""
    root.mkdir(parents=True, exist_ok=True)
    note = root / "lock.json"
    with (root / "lock").open("a") as file:  # never deleted: another process may have opened it already
        _take(file, note)
        with _renewing(note):
            yield


def _take(file: IO[str], note: Path) -> None:
    """Locks the file and leaves a note. The lock goes when the file is closed, however its process ends."""
    host, held = socket.gethostname(), _read(note)
    is_locked = _lock(file)
    if held and not (is_locked and held["host"] == host):  # on this host, a lock tells the truth
        if (held["host"] == host and is_locked is False) or _is_renewed(note):
            raise ValueError(_explain(note.parent, held))
        is_locked = _lock(file)  # a server of NFS takes a while to let go of a host that is gone
    if is_locked is False:
        raise ValueError(_explain(note.parent, held))
    write_text(note, json.dumps({"pid": os.getpid(), "host": host, "since": time.strftime("%F %T %Z")}))


def _lock(file: IO[str]) -> bool | None:
    """Whether the file is locked now; None if its file system has no locks, so that the note alone has to do."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_renewed(note: Path) -> bool:
    """Waits until the note is renewed, or too old to be believed."""
    age = _age(note)
    while age < STALE_AFTER_S:
        time.sleep(0.5)
        before, age = age, _age(note)
        if age < before:
            return True
    return False


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
    """Seconds since the note was renewed, by the clock of the storage: hosts' clocks differ. Infinite if it is gone."""
    probe = note.with_name(f".lock-{os.getpid()}")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink(missing_ok=True)
    try:
        with note.open() as file:  # opened, because a network's file system looks again then
            return now - os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return math.inf


def _explain(root: Path, holder: dict[str, object]) -> str:
    who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}" if holder else "another process"
    return (
        f"{str(root)!r} is in use by {who}: wait for it, stop it (the same command then goes on from there), or choose "
        "another name"
    )
