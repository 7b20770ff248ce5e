"""What ended a trial's workers, and what is done about it.

Ray Train starts workers again from their last checkpoint. Two faults would only come back: memory that does not suffice,
so the second attempt takes one window a pass, and there is no third; and storage that fails, which ends the search.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from shoal_services.training.folder import OUT_OF_MEMORY, TrialFolder

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
MEMORY_WORDS = ("OutOfMemory", "MemoryError", "out of memory", "OUT_OF_MEMORY", "can't allocate memory", "low on memory")
MAX_CHARACTERS = 300


class FaultNotes(UserCallback):
    """Notes in the folder of a trial what ended its workers; ends training where another attempt is no use."""

    def __init__(self, folder: TrialFolder, key: str):
        self.folder, self.key = folder, key

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        error = worker_exceptions[min(worker_exceptions)]
        if self.folder.has_ended(self.key):
            raise RuntimeError(f"the trial has ended: {describe_fault(error)}")
        raise_storage_error(str(error), self.folder.root)
        fault, before = describe_fault(error), self.folder.read_faults(self.key)
        self.folder.note_fault(self.key, fault)
        if fault.startswith(OUT_OF_MEMORY) and any(one.startswith(OUT_OF_MEMORY) for one in before):
            raise MemoryError(
                f"{fault}; with one window a pass too: use a smaller window, workers with more memory, or run.streamed"
            )


def describe_fault(error: Exception) -> str:
    """What ended a worker, in a line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_CHARACTERS]
    if any(word in f"{type(error).__name__} {error}" for word in MEMORY_WORDS):
        return f"{OUT_OF_MEMORY}: {text}"
    return text


def raise_storage_error(said: str, storage: Path) -> None:
    """Raises OSError if what an error says, whatever library made it, is that a disk is full or fails.

    Its file name is the one that is said, as /tmp may be full and the storage is not, or else the storage.
    """
    for number in STORAGE_ERRORS:
        if os.strerror(number) in said:
            named = re.search(rf"{re.escape(os.strerror(number))}: '(/[^']+)'", said)
            raise OSError(number, os.strerror(number), named[1] if named else str(storage))


@contextmanager
def limit_steps(seconds: float) -> Iterator[Callable[[], None]]:
    """What the block calls at each step. A process that does not, for so long, says where it stands, and ends.

    Workers that wait for each other for ever would be waited for as long; dead ones are started again.
    """

    def live() -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # needs neither the interpreter nor its lock

    live()
    try:
        yield live
    finally:
        faulthandler.cancel_dump_traceback_later()
