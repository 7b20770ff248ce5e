"""What Ray's workers do in tests, where they find it by its name."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist
from shoal_services.search.folder import RunFolder, TrialResult
from shoal_services.training.ranks import end_all


def lose_a_rank(job: dict[str, Any]) -> None:
    """Rank 1 meets an error that is the trial's, while rank 0 waits for it in a collective."""
    folder = RunFolder(Path(job["root"]))
    if ray.train.get_context().get_world_rank() == 0:
        dist.barrier()
        return
    result = TrialResult(key=job["key"], assignment={}, status="failed", reason="rank 1 has no such file")
    end_all(functools.partial(folder.write_result, result), ValueError(result.reason))
