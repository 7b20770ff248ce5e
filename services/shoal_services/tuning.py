"""What trials need of Ray, whatever a trial makes: Tune drives them, Train's workers do the work, Ctrl-C ends it all."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import ray.train
import ray.tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from shoal_services.config import Workers
from shoal_services.events import TrialEvents, Trials
from shoal_services.faults import FaultNotes, raise_storage_error
from shoal_services.folder import TrialEnd, TrialFolder
from shoal_services.interrupts import interruptible
from shoal_services.network import NodeAddressConfig

START_TIMEOUT_FAILURES, DRIVER_FAILURES = 3, 2
# Tune wants a driver to ask for something.
DRIVER_MEMORY = 2**20
# Workers that wait in a collective do so while another one reads the model, which its node may have to download first.
# For what rank 0 does alone they wait without one, dead workers are noticed by Ray, and slow steps by `run.step_limit_s`.
COLLECTIVE_LIMIT_S = 2 * 3600

E = TypeVar("E", bound=TrialEnd)


class Audience(Protocol):
    """Who hears of trials while they run: a `Listener`, and remarks."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...

    def remark(self, text: str) -> None: ...


class Grid(Trials, Protocol):
    """A configuration whose trials are all known before."""

    @property
    def run(self) -> Workers: ...

    def assignments(self) -> list[dict[str, Any]]: ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


def run_missing(
    driver: Callable[..., None], config: Grid, concurrent: int, events: TrialEvents[E], audience: Audience
) -> None:
    """Trials that have no result, one Tune trial each; those that were cut off go on from their checkpoints.

    Those that failed before are tried again.
    """
    folder, assignments = events.folder, config.assignments()
    reopen_failed(folder, audience)
    missing = [one for one in assignments if folder.read_result(config.trial_key(one)) is None]
    audience("trials", len(assignments) - len(missing), len(assignments))
    if not missing:
        return
    tune_config = ray.tune.TuneConfig(max_concurrent_trials=concurrent, reuse_actors=True)
    job = {"config": config.model_dump(mode="json"), "root": str(folder.root)}
    tune_trials(driver, job, {"assignment": ray.tune.grid_search(missing)}, events, tune_config)


def reopen_failed(folder: TrialFolder, audience: Audience) -> None:
    """Trials that failed before count as cut off, once for each time that the command is given."""
    if failed := folder.reopen_failed():
        audience.remark(f"{len(failed)} trials failed before and are tried again: {', '.join(failed)}")


def run_workers(
    loop: Callable[[dict], None], job: dict[str, Any], workers: Workers, folder: TrialFolder[E], key: str,
    assignment: dict[str, Any],
) -> E:  # fmt: skip
    """The result that `loop` left of one trial, on Train's workers; a failed one where they failed for good."""
    folder.write_started(key, assignment)
    job = {**job, "key": key, "assignment": assignment}
    reason = train_on_workers(loop, job, workers, folder)
    if reason is not None:
        failed = folder.result_class(key=key, assignment=assignment, status="failed", reason=reason)
        folder.write_result(cast(E, failed))
    result = folder.read_result(key)
    assert result is not None
    return result


def tune_trials(
    driver: Callable[..., None], job: dict[str, Any], space: dict[str, Any], events: TrialEvents,
    tune_config: ray.tune.TuneConfig,
) -> None:  # fmt: skip
    """Runs `driver(assignment, job)` as Tune trials under the folder `job["root"]`; a driver whose node dies begins again.

    Raises KeyboardInterrupt after a clean stop, OSError if the storage fails.
    """
    _quieten()
    job, root = _without_tracker(job), Path(job["root"])
    shutil.rmtree(root / "tune", ignore_errors=True)  # of an earlier start: nothing there is needed
    tuner = ray.tune.Tuner(
        # A driver waits more than it works: all CPUs are for Train's workers, which would starve otherwise.
        ray.tune.with_resources(ray.tune.with_parameters(driver, job=job), {"cpu": 0, "memory": DRIVER_MEMORY}),
        param_space=space,
        tune_config=tune_config,
        run_config=ray.tune.RunConfig(
            name="tune", storage_path=str(root), callbacks=[events], verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=DRIVER_FAILURES),
        ),
    )  # fmt: skip
    with interrupt_for_sure(events):
        tuner.fit()


def _without_tracker(job: dict[str, Any]) -> dict[str, Any]:
    """The job without the tracker's address: it may hold a password, Ray shows settings, and no worker needs it."""
    match job:
        case {"config": {"run": dict(run)}}:
            run = {name: value for name, value in run.items() if name != "tracking_uri"}
            return {**job, "config": {**job["config"], "run": run}}
    return job


def train_on_workers(
    loop: Callable[[dict], None], job: dict[str, Any], workers: Workers, folder: TrialFolder
) -> str | None:
    """Runs `loop(job)` on Train's workers, with checkpoints in the trial's folder that a later call goes on from.

    Returns None, or why it failed for good; the checkpoints are gone then. Raises OSError if the storage fails.
    """
    place = folder.trial(job["key"])
    least, most = workers.num_workers, workers.most_workers
    resources = {"CPU": workers.cpus_per_worker} | ({"GPU": workers.gpus_per_worker} if workers.gpus_per_worker else {})
    trainer = TorchTrainer(
        loop,
        train_loop_config=job,
        torch_config=NodeAddressConfig(timeout_s=COLLECTIVE_LIMIT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=least if least == most else (least, most),  # type: ignore[arg-type]  # v1's classes are declared
            use_gpu=workers.gpus_per_worker > 0, resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name="train", storage_path=str(place),
            callbacks=[TuneReportCallback(), FaultNotes(folder, job["key"])],  # type: ignore[list-item]
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
        raise_storage_error(str(error), folder.root)
        reason = " ".join(str(error).split())[-500:]
    shutil.rmtree(place / "train", ignore_errors=True)
    return reason


@contextmanager
def interrupt_for_sure(events: TrialEvents) -> Iterator[None]:
    """Inside, a signal raises KeyboardInterrupt, and again at Tune's next step if the first was lost.

    Python drops an exception that is raised inside a callback of compiled code, and Ray's loop runs many of them.
    """
    try:
        with interruptible(events.end):
            yield
    finally:
        events.raise_if_ending()  # also where Tune stumbles over what it could not write


def _quieten() -> None:
    """Tune's own messages go to Ray's log files; the terminal is for progress, and for errors in our words."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"(ray|optuna)\..*")
    # Ctrl-C reaches us as KeyboardInterrupt: Tune's own handler would return as if the search had ended.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial may fail before its first report
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new output prints a table whatever `verbose` is
