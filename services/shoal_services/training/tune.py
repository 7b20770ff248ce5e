"""A set of trials, driven by Ray Tune, whatever a trial makes; Ctrl-C ends it cleanly."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import ray.train
import ray.tune

from shoal_services.interrupts import interruptible
from shoal_services.training.folder import TrialEnd, TrialFolder
from shoal_services.training.trial_events import TrialEvents, Trials
from shoal_services.training.workers import Workers

DRIVER_FAILURES = 2
# Tune wants a driver to ask for something.
DRIVER_MEMORY = 2**20

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
