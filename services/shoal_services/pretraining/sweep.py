"""The story of a sweep: check → read texts → runs → results → page. Started again, it goes on where it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.tune
from shoal.paper.pretrain_corpus import load_pretrain_corpus

from shoal_services.cluster.connect import connect
from shoal_services.cluster.preflight import clear_cluster
from shoal_services.pretraining.config import PretrainConfig
from shoal_services.pretraining.page import write_pretraining_page
from shoal_services.pretraining.results import FIELDS, SCORES, PretrainFolder, PretrainResult, summarise, write_results
from shoal_services.tracking.tracker import Delivery, Tracker
from shoal_services.training.lock import lock_folder
from shoal_services.training.train import run_workers
from shoal_services.training.trial_events import TrialEvents, read_assignment
from shoal_services.training.tune import Audience, run_missing


@dataclass(frozen=True)
class PretrainOutcome:
    """What a sweep came to."""

    folder: Path
    results: list[PretrainResult]
    tracking_uri: str
    delivery: Delivery


class PretrainAudience(Audience, Protocol):
    """Who hears of a sweep while it runs: also runs as they end."""

    def show_run(self, result: PretrainResult) -> None: ...


class PretrainEvents(TrialEvents[PretrainResult]):
    """A Tune callback for one sweep."""

    metrics = ("loss", "lm_loss", "penalty", "learning_rate", "gradient_norm", "validation_perplexity", *SCORES)

    def name_trial(self, assignment: dict[str, Any]) -> str:
        return f"{assignment['kind']} {assignment['weight']:g} seed {assignment['seed']}"

    def record_result(self, run: str, result: PretrainResult) -> None:
        for check in result.checks[-1:]:
            final = {f"final_{name}": check[name] for name in FIELDS}
            size = {"num_parameters": float(result.num_parameters or 0)}
            self.tracker.log_metrics(run, final | size, step=int(check["step"]))
            self.tracker.log_tags(run, {"artefact": result.model or ""})


def run_pretraining(config: PretrainConfig, audience: PretrainAudience, *, num_cpus: int | None = None) -> PretrainOutcome:
    """Trains every model of the sweep that is not trained yet, and leaves models, results, page and MLflow runs behind.

    Raises ValueError or OSError for what cannot work (before any run), KeyboardInterrupt after a clean stop.
    """
    folder = PretrainFolder(config.folder)
    audience("start Ray", 0, 1)
    try:
        connect(config.run.address, num_cpus=num_cpus)
        audience("start Ray", 1, 1)
        return sweep(config, folder, audience)
    finally:
        ray.shutdown()


def sweep(config: PretrainConfig, folder: PretrainFolder, audience: PretrainAudience) -> PretrainOutcome:
    """The same on the cluster that this process is connected to."""
    concurrent = clear_cluster(config.run, folder.root, audience.remark)
    with lock_folder(folder.root):
        return _sweep(config, folder, concurrent, audience)


def _sweep(config: PretrainConfig, folder: PretrainFolder, concurrent: int, audience: PretrainAudience) -> PretrainOutcome:
    folder.claim(config.name, config.science, extensible="sweep")
    _prepare(config.resolved(), folder, audience)
    tracker = Tracker(folder.root, uri=config.run.tracking_uri, experiment=f"shoal-{config.name}")
    events = PretrainEvents(config, folder, tracker, on_end=lambda result: _after_run(config, folder, result, audience))
    with events.running():
        run_missing(drive_run, config, concurrent, events, audience)
        events.record_missed()
        results = write_page(config, folder)
        _publish(events.parent, folder, results, tracker)
    return PretrainOutcome(folder.root, folder.read_results(), tracker.uri, tracker.delivery)


def _prepare(config: PretrainConfig, folder: PretrainFolder, audience: PretrainAudience) -> None:
    """Tokenizer and windows in `prepared/`, made once by a worker."""
    audience("read texts", 0, 1)
    if not (folder.prepared / "corpus.safetensors").exists():
        work = ray.remote(num_cpus=config.run.cpus_per_worker, max_retries=2)(_write_corpus)
        try:
            ray.get(work.remote(config.model_dump(mode="json"), folder.prepared))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
    audience("read texts", 1, 1)


def _write_corpus(payload: dict[str, Any], prepared: Path) -> None:
    config = PretrainConfig.model_validate(payload)
    corpus, tokenizer = load_pretrain_corpus(config.make_recipe(config.assignments()[0]))
    tokenizer.save_pretrained(prepared / "tokenizer")
    corpus.save(prepared / "corpus.safetensors")


def drive_run(config: dict[str, Any], job: dict[str, Any]) -> None:
    """One Tune trial: a cheap driver of a Ray Train job."""
    sweep, folder = PretrainConfig.model_validate(job["config"]), PretrainFolder(Path(job["root"]))
    assignment = read_assignment(config)
    key = sweep.trial_key(assignment)
    result = run_workers("shoal_services.pretraining.trial:pretrain_run", job, sweep.run, folder, key, assignment)
    if result.status == "finished":
        ray.tune.report({"validation_perplexity": result.checks[-1]["validation_perplexity"], "key": key})


def _after_run(config: PretrainConfig, folder: PretrainFolder, result: PretrainResult, audience: PretrainAudience) -> None:
    """Results and page are whole after every run, not at the end alone."""
    write_page(config, folder)
    audience.show_run(result)
    audience("trials", len(folder.read_results()), len(config.assignments()))


def write_page(config: PretrainConfig, folder: PretrainFolder) -> list[PretrainResult]:
    """`pretraining.json` and `pretraining.html` of the runs that have finished."""
    results = write_results(config, folder)
    write_pretraining_page(folder.root / "pretraining.html", config.name, results)
    return results


def _publish(parent: str, folder: PretrainFolder, results: list[PretrainResult], tracker: Tracker) -> None:
    """The sweep's own run."""
    for name in ("config.json", "pretraining.json", "pretraining.html"):
        tracker.log_artifact(parent, folder.root / name)
    for row in summarise(results):
        name = row["kind"] if row["kind"] == "none" else f"{row['kind']}_{row['weight']:g}"
        tracker.log_metrics(parent, {f"{field}/{name}": row[field]["mean"] for field in FIELDS})
    tracker.end_orphans(parent)
    tracker.end_run(parent, "FINISHED" if results else "FAILED")
