"""Who hears how far long work is."""

from __future__ import annotations

from collections.abc import Callable

Listener = Callable[[str, int, int], None]
"""Hears (stage, done, total) while long work goes on."""


def ignore(_stage: str, _done: int, _total: int) -> None:
    """The listener that does nothing."""


def count_on(listen: Listener, stage: str, before: int, total: int) -> Callable[[int], None]:
    """A listener for a part of a stage: it hears how much of the part is done, `before` was done by other parts."""
    return lambda done: listen(stage, before + done, total)
