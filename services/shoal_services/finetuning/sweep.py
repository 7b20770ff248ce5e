"""The story of `shoal finetune`: check → one Ray Train job a seed → before and after. Started again, it goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.tune
from shoal.files import write_text

from shoal_services.cluster.connect import connect
from shoal_services.cluster.preflight import clear_cluster
from shoal_services.finetuning.config import FinetuneConfig
from shoal_services.finetuning.results import MEASURES, Finetuned, FinetuneFolder, FinetuneResult, mean_over_blocks
from shoal_services.pages.linearity_page import write_comparison_page
from shoal_services.tracking.tracker import Delivery, Tracker
from shoal_services.training.lock import lock_folder
from shoal_services.training.train import run_workers
from shoal_services.training.trial_events import TrialEvents, read_assignment
from shoal_services.training.tune import Audience, run_missing


@dataclass(frozen=True)
class FinetuneOutcome:
    """What a fine-tuning came to. `finetuned` is None if no seed has finished."""

    folder: Path
    finetuned: Finetuned | None
    results: list[FinetuneResult]
    tracking_uri: str
    delivery: Delivery


class FinetuneEvents(TrialEvents[FinetuneResult]):
    """A Tune callback for one fine-tuning."""

    def name_trial(self, assignment: dict[str, Any]) -> str:
        return f"seed {assignment['seed']}"

    def record_result(self, run: str, result: FinetuneResult) -> None:
        if result.blocks:
            means = {f"mean_{field}": mean_over_blocks(result.scores(), field) for field in MEASURES}
            accuracy = {"accuracy": result.accuracy or 0.0, "held_out_loss": result.held_out_loss or 0.0}
            self.tracker.log_metrics(run, means | accuracy)
            self.tracker.log_tags(run, {"artefact": result.model or ""})


def run_finetuning(config: FinetuneConfig, audience: Audience, *, num_cpus: int | None = None) -> FinetuneOutcome:
    """Fine-tunes with every seed that has not finished, and leaves models, results, page and MLflow runs behind.

    Raises ValueError or OSError for what cannot work (before any run), KeyboardInterrupt after a clean stop.
    """
    config.load_examples()
    folder, resolved = FinetuneFolder(config.folder), config.resolved()
    audience("start Ray", 0, 1)
    try:
        connect(config.run.address, num_cpus=num_cpus)
        inputs = (resolved.model, resolved.data, *resolved.texts.train)
        concurrent = clear_cluster(config.run, folder.root, audience.remark, inputs)
        with lock_folder(folder.root):
            folder.claim(config.name, config.science, extensible="seeds")
            audience("start Ray", 1, 1)
            return _finetune(resolved, folder, concurrent, audience)
    finally:
        ray.shutdown()


def _finetune(config: FinetuneConfig, folder: FinetuneFolder, concurrent: int, audience: Audience) -> FinetuneOutcome:
    tracker = Tracker(folder.root, uri=config.run.tracking_uri, experiment=f"shoal-{config.name}")
    events = FinetuneEvents(config, folder, tracker, on_end=lambda _: _count(config, folder, audience))
    with events.running():
        run_missing(drive_seed, config, concurrent, events, audience)
        events.record_missed()
        finetuned = _conclude(config, folder, tracker, events.parent)
    return FinetuneOutcome(folder.root, finetuned, folder.read_results(), tracker.uri, tracker.delivery)


def _count(config: FinetuneConfig, folder: FinetuneFolder, audience: Audience) -> None:
    audience("trials", len(folder.read_results()), len(config.seeds))


def drive_seed(config: dict[str, Any], job: dict[str, Any]) -> None:
    """One Tune trial: a cheap driver of a Ray Train job."""
    sweep, folder = FinetuneConfig.model_validate(job["config"]), FinetuneFolder(Path(job["root"]))
    assignment = read_assignment(config)
    key = sweep.trial_key(assignment)
    result = run_workers("shoal_services.finetuning.trial:finetune_run", job, sweep.run, folder, key, assignment)
    if result.status == "finished":
        ray.tune.report({"accuracy": result.accuracy, "key": key})


def _conclude(config: FinetuneConfig, folder: FinetuneFolder, tracker: Tracker, parent: str) -> Finetuned | None:
    """`finetuning.json`, the page, and the sweep's own run."""
    finetuned = Finetuned.read(config, folder) if folder.before.exists() else None
    if finetuned is None or not finetuned.results:
        tracker.end_orphans(parent)
        tracker.end_run(parent, "FAILED")
        return None
    write_text(folder.root / "finetuning.json", json.dumps(finetuned.as_dict(), indent=2))
    write_comparison_page(folder.root / "linearity.html", finetuned.profiles())
    tracker.log_metrics(parent, {f"change_{field}": finetuned.change(field).mean for field in MEASURES})
    for name in ("finetuning.json", "linearity.html"):
        tracker.log_artifact(parent, folder.root / name)
    tracker.end_orphans(parent)
    tracker.end_run(parent, "FINISHED")
    return finetuned
