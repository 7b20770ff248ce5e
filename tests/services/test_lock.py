"""One search at a time in a folder, whoever else is there and however it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from shoal_services.training.lock import STALE_AFTER_S, lock_folder

HOLD = """
import pathlib, sys, time
from shoal_services.training.lock import STALE_AFTER_S, lock_folder
with lock_folder(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def leave_note(folder: Path, host: str, *, age_s: float) -> None:
    """What a process on that host has left, or renews."""
    (folder / "lock.json").write_text(json.dumps({"pid": 7, "host": host, "since": "yesterday"}))
    os.utime(folder / "lock.json", (time.time() - age_s,) * 2)


def test_a_folder_in_use_is_refused_with_its_holder_until_that_process_is_gone(tmp_path):
    """Killed, it leaves its note; the lock goes with it."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=f"is in use by process {holder.pid} on .*, since .*: wait for it, stop it"),
            lock_folder(tmp_path),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert (tmp_path / "lock.json").exists()
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock.json").exists()


def test_another_host_is_there_if_it_renews_its_note(tmp_path):
    """Mounted buckets do not tell one host of another's lock."""
    leave_note(tmp_path, "elsewhere", age_s=5)
    renewal = threading.Timer(1, (tmp_path / "lock.json").touch)
    renewal.start()
    with pytest.raises(ValueError, match="is in use by process 7 on elsewhere, since yesterday"), lock_folder(tmp_path):
        pass
    renewal.join()
    leave_note(tmp_path, "elsewhere", age_s=STALE_AFTER_S - 1)
    with lock_folder(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 3}'])
def test_half_a_note_holds_nobody_up(tmp_path, content):
    (tmp_path / "lock.json").write_text(content)
    with lock_folder(tmp_path):
        pass


def test_two_folders_are_held_at_once_and_errors_let_go(tmp_path):
    with pytest.raises(RuntimeError, match="of the block"), lock_folder(tmp_path / "a"), lock_folder(tmp_path / "b"):
        raise RuntimeError("of the block")
    with lock_folder(tmp_path / "a"), lock_folder(tmp_path / "b"):
        pass
