"""What trials need of Ray, whatever a trial makes: Tune drives them, Train's workers do the work, Ctrl-C ends it all."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray.train
import ray.tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from shoal_services.config import Workers
from shoal_services.events import TrialEvents

START_TIMEOUT_FAILURES = 3
# Tune wants a driver to ask for something.
DRIVER_MEMORY = 2**20


def tune_trials(
    driver: Callable[..., None], job: dict[str, Any], space: dict[str, Any], events: TrialEvents,
    tune_config: ray.tune.TuneConfig,
) -> None:  # fmt: skip
    """Runs `driver(assignment, job)` as Tune trials under the folder `job["root"]`.

    Raises KeyboardInterrupt after a clean stop.
    """
    _quieten()
    root = Path(job["root"])
    shutil.rmtree(root / "tune", ignore_errors=True)  # of an earlier start: nothing there is needed
    tuner = ray.tune.Tuner(
        # A driver waits more than it works: all CPUs are for Train's workers, which would starve otherwise.
        ray.tune.with_resources(ray.tune.with_parameters(driver, job=job), {"cpu": 0, "memory": DRIVER_MEMORY}),
        param_space=space,
        tune_config=tune_config,
        run_config=ray.tune.RunConfig(
            name="tune", storage_path=str(root), callbacks=[events], verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=0),
        ),
    )  # fmt: skip
    with interrupt_for_sure(events):
        tuner.fit()


def train_on_workers(loop: Callable[[dict], None], job: dict[str, Any], workers: Workers, folder: Path) -> str | None:
    """Runs `loop(job)` on Train's workers, with checkpoints under `folder` that a later call goes on from.

    Returns None, or why it failed for good; the checkpoints are gone then.
    """
    resources = {"CPU": workers.cpus_per_worker} | ({"GPU": workers.gpus_per_worker} if workers.gpus_per_worker else {})
    trainer = TorchTrainer(
        loop,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.num_workers, use_gpu=workers.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name="train", storage_path=str(folder), callbacks=[TuneReportCallback()],  # type: ignore[list-item]
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]  # ray.train's v1 classes are declared
                max_failures=workers.max_failures, controller_failure_limit=START_TIMEOUT_FAILURES
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )  # fmt: skip
    reason = None
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        reason = " ".join(str(error).split())[-500:]
    shutil.rmtree(folder / "train", ignore_errors=True)
    return reason


@contextmanager
def interrupt_for_sure(events: TrialEvents) -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt, and again at Tune's next step if the first was lost.

    Python drops an exception that is raised inside a callback of compiled code, and Ray's loop runs many of them.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        events.interrupted = True
        signal.default_int_handler(signum, frame)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
        events.raise_if_interrupted()
    finally:
        signal.signal(signal.SIGINT, before)


def _quieten() -> None:
    """Tune's own messages go to Ray's log files; the terminal is for progress."""
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(ray|optuna)\..*")
    # Ctrl-C reaches us as KeyboardInterrupt: Tune's own handler would return as if the search had ended.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new output prints a table whatever `verbose` is
