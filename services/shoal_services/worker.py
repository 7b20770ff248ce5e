"""What Ray's own actors unpickle to train: so light that only the worker itself loads torch and transformers."""

from __future__ import annotations

from typing import Any


def train_worker(job: dict[str, Any]) -> None:
    """`shoal_services.train.train_trial`, imported where it runs."""
    from shoal_services.train import train_trial

    train_trial(job)


def finetune_worker(task: dict[str, Any]) -> None:
    """`shoal_services.finetuning.tune_seed`, imported where it runs; `task` is {job, seed}."""
    from shoal_services.finetuning import FinetuningJob, tune_seed

    tune_seed(FinetuningJob.model_validate(task["job"]), task["seed"])
