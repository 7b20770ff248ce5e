"""Many trials at once that only report, as a search's trials do: what the driver and the tracker make of their time."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.tune
from shoal_services.cluster.connect import connect
from shoal_services.tracking.tracker import Tracker
from shoal_services.training.folder import TrialEnd, TrialFolder
from shoal_services.training.trial_events import TrialEvents, read_assignment
from shoal_services.training.tune import tune_trials

METRICS = ("loss", "learning_rate", "gradient_norm", "held_out_kl", "held_out_perplexity", "num_parameters")
START_AFTER_S = 5.0


class DummyResult(TrialEnd):
    """How long a trial took from its first report to its last, in seconds."""

    seconds: float = 0.0


class DummyFolder(TrialFolder[DummyResult]):
    result_class = DummyResult


@dataclass(frozen=True)
class DummySweep:
    """So many trials, that report so many times, every so many seconds."""

    folder: Path
    num_trials: int
    num_reports: int
    every_s: float
    name: str = "dummy"
    science = {"work": "none"}  # noqa: RUF012

    def trial_key(self, assignment: dict[str, Any]) -> str:
        return str(assignment["trial"])


class DummyEvents(TrialEvents[DummyResult]):
    metrics = METRICS

    def name_trial(self, assignment: dict[str, Any]) -> str:
        return f"trial {assignment['trial']}"

    def record_result(self, run: str, result: DummyResult) -> None:
        self.tracker.log_metrics(run, {"seconds": result.seconds})


def run_trial(config: dict[str, Any], job: dict[str, Any]) -> None:
    """Reports at its hours, once all trials are up: a report returns when the driver has taken it."""
    key = str(read_assignment(config)["trial"])
    ready = Path(job["root"]) / "ready"
    (ready / key).touch()
    while len(os.listdir(ready)) < job["num_trials"]:
        time.sleep(0.2)
    time.sleep(START_AFTER_S)
    started = time.monotonic()
    for step in range(job["num_reports"]):
        time.sleep(job["every_s"])
        ray.tune.report({"step": step, **dict.fromkeys(METRICS, float(step))})
    result = DummyResult(key=key, assignment={}, status="finished", seconds=time.monotonic() - started)
    DummyFolder(Path(job["root"])).write_result(result)


def measure_overhead(sweep: DummySweep, *, num_cpus: int) -> tuple[list[float], float, int]:
    """Each trial's time beyond its work, as a share of the work; CPU seconds of the driver, tracker included, per trial;
    records that had not reached MLflow when the last trial ended."""
    connect(None, num_cpus=num_cpus)
    folder = DummyFolder(sweep.folder)
    (sweep.folder / "ready").mkdir(parents=True)
    tracker = Tracker(sweep.folder, uri=None, experiment="dummy")
    unsent = [0]
    events = DummyEvents(sweep, folder, tracker, on_end=lambda _result: unsent.__setitem__(0, tracker.num_unsent))
    job = {
        "root": str(sweep.folder), "num_trials": sweep.num_trials, "num_reports": sweep.num_reports,
        "every_s": sweep.every_s,
    }  # fmt: skip
    space = {"assignment": ray.tune.grid_search([{"trial": index} for index in range(sweep.num_trials)])}
    before = time.process_time()
    with events.running():
        tune_trials(run_trial, job, space, events, ray.tune.TuneConfig(max_concurrent_trials=sweep.num_trials))
    cpu_s = time.process_time() - before
    ray.shutdown()
    work_s = sweep.num_reports * sweep.every_s
    shares = [result.seconds / work_s - 1 for result in folder.read_results()]
    return shares, cpu_s / sweep.num_trials, unsent[0]
