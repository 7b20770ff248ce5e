"""What Ray's own actors unpickle to run a trial: so light that only the worker that trains loads torch and transformers."""

from __future__ import annotations

from typing import Any


def finetune_worker(job: dict[str, Any]) -> None:
    """`shoal_services.finetuning.train.finetune_run`, imported where it runs."""
    from shoal_services.finetuning.train import finetune_run

    finetune_run(job)
