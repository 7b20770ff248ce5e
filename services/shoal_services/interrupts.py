"""The signals that end a run: Ctrl-C, a SIGTERM, and the SIGHUP of a terminal that is closed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop; shells know what ended it by `exit_code`."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


def _ignore(_: Interrupted) -> None:
    pass


@contextmanager
def interruptible(note: Callable[[Interrupted], None] = _ignore) -> Iterator[None]:
    """Inside, these signals raise Interrupted, after `note` has heard of it; those that are ignored (`nohup`) stay so."""
    came: list[Interrupted] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        came.append(Interrupted(signum))
        note(came[-1])
        raise came[-1]

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other gets signals
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    except KeyboardInterrupt as error:  # Ray's compiled code makes a new one of what is raised in it
        if came and error is not came[-1]:
            raise came[-1] from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
