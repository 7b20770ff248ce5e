"""What Ray's own actors unpickle to run a trial: so light that only the worker that trains loads torch and transformers."""

from __future__ import annotations

from typing import Any


def train_worker(job: dict[str, Any]) -> None:
    """`shoal_services.train.train_trial`, imported where it runs."""
    from shoal_services.train import train_trial

    train_trial(job)
