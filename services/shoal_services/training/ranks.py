"""What the workers of one trial do together: agree, report with a checkpoint, go on from it, hear that they have to go."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist

LOOK_EVERY_S = 1.0


def tell(value: Any) -> Any:
    """Rank 0's value, on all ranks. Every rank calls this."""
    told = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


def wait_for(file: Path) -> None:
    """Waits until rank 0 has written a file: however long it takes, unlike in a collective.

    Rank 0 raises if it fails, and Train then ends all ranks.
    """
    while not file.exists():
        time.sleep(LOOK_EVERY_S)


def end_all(record: Callable[[], object], error: Exception) -> None:
    """Ends a trial for an error that another attempt would meet again: it is recorded, and no rank waits for this one.

    Other ranks may stand in a collective, so that this one must not simply return: it raises, and Train ends them all.
    """
    record()
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise error


def report(metrics: dict[str, Any], state: dict | None, aside: Path) -> None:
    """Reports to Train, and so to Tune; with a state, also a checkpoint, rank 0's. Every rank calls this alike.

    The checkpoint is written in the folder `aside` first: /tmp may be small, and a folder of the storage is not.
    """
    aside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=aside, prefix=".checkpoint-", ignore_cleanup_errors=True) as folder:
        checkpoint = None
        if state is not None and ray.train.get_context().get_world_rank() == 0:
            torch.save(state, Path(folder) / "state.pt")
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint)


def read_state() -> dict | None:
    """The state in the last checkpoint, where workers died before."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / "state.pt", weights_only=True)


class Notice:
    """What every rank is to hear of, looked for once a second: that a node of these workers is about to be taken away, as
    clouds tell it, and that their trial was stopped, which leaves a result."""

    def __init__(self, result: Path) -> None:
        self.result = result
        self.looked_at, self.came = time.monotonic(), False
        self.is_stopped = False

    def comes(self) -> bool:
        """Whether there is notice of a node's end now, and was none before. Every rank calls this alike."""
        due = time.monotonic() - self.looked_at >= LOOK_EVERY_S
        due, self.is_stopped = tell((due, due and self.result.exists()))
        if self.came or not due:
            return False
        self.looked_at = time.monotonic()
        self.came = ray.train.get_preemption_info() is not None
        return self.came
