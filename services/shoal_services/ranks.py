"""What the workers of one trial do together: agree, report with a checkpoint, go on from it, hear that they have to go."""

from __future__ import annotations

import tempfile
import time
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


def report(metrics: dict[str, Any], state: dict | None) -> None:
    """Reports to Train, and so to Tune; with a state, also a checkpoint, rank 0's. Every rank calls this alike."""
    with tempfile.TemporaryDirectory() as folder:
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
    """Notice that a node of these workers is about to be taken away, as clouds give it; looked for once a second."""

    def __init__(self) -> None:
        self.looked_at, self.came = time.monotonic(), False

    def comes(self) -> bool:
        """Whether there is notice now, and was none before. Every rank calls this alike."""
        if self.came or not tell(time.monotonic() - self.looked_at >= LOOK_EVERY_S):
            return False
        self.looked_at = time.monotonic()
        self.came = ray.train.get_preemption_info() is not None
        return self.came
