"""What Ray's own actors unpickle to run a trial: so light that only the worker that trains loads torch and transformers."""

from __future__ import annotations

from typing import Any


def pretrain_worker(job: dict[str, Any]) -> None:
    """`shoal_services.pretraining.train.pretrain_run`, imported where it runs."""
    from shoal_services.pretraining.train import pretrain_run

    pretrain_run(job)
