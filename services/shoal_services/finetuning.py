"""Fine-tuning over several seeds, and what it does to linearity: one Ray Train job a seed, all at once where they fit.

    shoal-runs/NAME/   finetuning.json   seed-0/result.json   seed-0/model/   linearity.html

Started again, seeds that have a result are taken up, and the others go on from their last checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import ray
import ray.train
import ray.tune
from pydantic import Field, model_validator
from ray.train.torch import TorchTrainer
from shoal.files import write_text
from shoal.finetune import Examples, Finetuning, FinetuningRun
from shoal.labelled import load_labelled, load_preferences
from shoal.linearity import BlockLinearity, score_blocks
from shoal.profile import Profile
from shoal.recipe import Text, Texts, Value, fingerprint

from shoal_services.cluster import check_cluster, connect
from shoal_services.config import Run
from shoal_services.tracking import Tracker
from shoal_services.trials import quieten
from shoal_services.worker import finetune_worker

START_TIMEOUT_FAILURES = 3
MEASURES = ("score", "score_without_residual", "held_out")


class FinetuningJob(Value):
    """What to fine-tune on what, how often, and on which text linearity is measured."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str
    revision: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    data: str
    task: Literal["classification", "preference"] = "classification"
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    seeds: tuple[int, ...] = (0, 1, 2)
    finetuning: Finetuning = Finetuning()
    texts: Texts = Texts()
    run: Run = Run()

    @model_validator(mode="after")
    def _several_seeds(self) -> Self:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: give one or more, each once")
        return self

    @property
    def folder(self) -> Path:
        return (self.run.storage / self.name).expanduser().resolve()

    def load_examples(self) -> tuple[Examples, Examples]:
        """(training, held out). Raises ValueError for data that cannot be learned from."""
        share = self.finetuning.held_out_share
        if self.task == "preference":
            return load_preferences(self.data).split(share)
        return load_labelled(self.data, text_columns=self.text_columns, label_column=self.label_column).split(share)


class SeedResult(Value):
    """One seed: accuracy on held-out examples, and every block's linearity afterwards."""

    seed: int
    accuracy: float
    accuracy_standard_error: float
    held_out_loss: float
    num_held_out: int
    scores: tuple[dict[str, float], ...]
    model: str

    def mean(self, field: str) -> float:
        """A score, mean over the blocks."""
        return statistics.fmean(score[field] for score in self.scores)


@dataclass(frozen=True)
class Finetuned:
    """What came out: the blocks' linearity before, and each seed's result."""

    job: FinetuningJob
    text: Text
    before: list[BlockLinearity]
    results: list[SeedResult]
    num_unsent: int = 0

    def change(self, field: str) -> tuple[float, float]:
        """Mean over seeds of (after − before) of a mean score, and its standard error (NaN for one seed)."""
        before = statistics.fmean(getattr(score, field) for score in self.before)
        changes = [result.mean(field) - before for result in self.results]
        error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.nan
        return statistics.fmean(changes), error

    def profiles(self) -> list[Profile]:
        """The model before, then after each seed, for a page that compares them."""
        named = {self.job.model: self.before}
        named |= {f"seed {r.seed}": [BlockLinearity(**score) for score in r.scores] for r in self.results}  # type: ignore[arg-type]
        return [Profile(name, self.text, scores, [], [], []) for name, scores in named.items()]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: the job, the changes, and each seed."""
        return {
            "job": self.job.model_dump(mode="json", exclude={"run"}), "text": self.text.model_dump(),
            "before": [dataclasses.asdict(score) for score in self.before],
            "change": {field: dict(zip(("mean", "standard_error"), self.change(field), strict=True)) for field in MEASURES},
            "seeds": [result.model_dump() for result in self.results],
        }  # fmt: skip


def run_finetuning(
    job: FinetuningJob, listen: Callable[[str, int, int], None], *, num_cpus: int | None = None
) -> Finetuned:
    """Fine-tunes with every seed and compares linearity. The same call goes on where it was interrupted.

    Raises ValueError or OSError for what cannot work, before anything is trained; RuntimeError if a seed fails.
    """
    job.load_examples()
    folder = job.folder
    listen("start Ray", 0, 1)
    started_here = not ray.is_initialized()
    connect(job.run.address, num_cpus=num_cpus)
    concurrent = check_cluster(job.run, folder)
    _claim(job)
    listen("start Ray", 1, 1)
    tracker = Tracker(folder, uri=job.run.tracking_uri, experiment=f"shoal-{job.name}")
    parent = f"{job.name}-{fingerprint(str(folder))}"
    tracker.start_run(parent, name=job.name, params={"model": job.model, "data": job.data, **job.finetuning.model_dump()})
    try:
        missing = [seed for seed in job.seeds if not (folder / f"seed-{seed}" / "result.json").exists()]
        listen("seeds", len(job.seeds) - len(missing), len(job.seeds))
        if missing:
            _fit_seeds(job, missing, concurrent, listen)
        finetuned = _collect(job)
        write_text(folder / "finetuning.json", json.dumps(finetuned.as_dict(), indent=2))
        _track(finetuned, tracker, parent)
    finally:
        num_unsent = tracker.close()
        if started_here:
            ray.shutdown()
    return dataclasses.replace(finetuned, num_unsent=num_unsent)


def _claim(job: FinetuningJob) -> None:
    """Makes the folder this job's. Raises ValueError if it holds another job of the same name."""
    job.folder.mkdir(parents=True, exist_ok=True)
    file, ours = job.folder / "job.json", job.model_dump(mode="json", exclude={"run", "seeds"})
    if file.exists() and (held := json.loads(file.read_text())) != ours:
        different = ", ".join(sorted(key for key in ours if held.get(key) != ours[key]))
        raise ValueError(f"{str(job.folder)!r} holds another fine-tuning: {different} differ; choose another --name")
    write_text(file, json.dumps(ours, indent=2))


def _fit_seeds(job: FinetuningJob, seeds: list[int], concurrent: int, listen: Callable[[str, int, int], None]) -> None:
    quieten()
    shutil.rmtree(job.folder / "tune", ignore_errors=True)
    watch = SeedsDone(job, len(job.seeds) - len(seeds), listen)
    resources = {"cpu": 0, "memory": 2**20}  # a driver waits more than it works
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(ray.tune.with_parameters(run_seed, job=job.model_dump(mode="json")), resources),
        param_space={"seed": ray.tune.grid_search(seeds)},
        tune_config=ray.tune.TuneConfig(max_concurrent_trials=concurrent),
        run_config=ray.tune.RunConfig(name="tune", storage_path=str(job.folder), verbose=0, callbacks=[watch]),
    )  # fmt: skip
    errors = [result.error for result in tuner.fit() if result.error]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(seeds)} seeds failed: {(str(errors[0]).splitlines() or ['?'])[-1]}")


class SeedsDone(ray.tune.Callback):
    """Tells a listener how many seeds are done."""

    def __init__(self, job: FinetuningJob, done: int, listen: Callable[[str, int, int], None]):
        self.done, self.total, self.listen = done, len(job.seeds), listen

    def __getstate__(self) -> dict:
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.done += 1
        self.listen("seeds", self.done, self.total)


def run_seed(config: dict[str, Any], job: dict[str, Any]) -> None:
    """One Tune trial: the driver of a Ray Train job."""
    run, folder = FinetuningJob.model_validate(job).run, FinetuningJob.model_validate(job).folder / f"seed-{config['seed']}"
    resources = {"CPU": run.cpus_per_worker} | ({"GPU": run.gpus_per_worker} if run.gpus_per_worker else {})
    TorchTrainer(
        finetune_worker, train_loop_config={"job": job, "seed": config["seed"]},
        scaling_config=ray.train.ScalingConfig(
            num_workers=run.num_workers, use_gpu=run.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name="train", storage_path=str(folder),
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]  # ray.train's v1 classes are declared
                max_failures=run.max_failures, controller_failure_limit=START_TIMEOUT_FAILURES
            ),
        ),
    ).fit()  # fmt: skip
    shutil.rmtree(folder / "train", ignore_errors=True)
    ray.tune.report({"seed": config["seed"]})


def _collect(job: FinetuningJob) -> Finetuned:
    before = json.loads((job.folder / "before.json").read_text())
    results = [
        SeedResult.model_validate_json((job.folder / f"seed-{seed}" / "result.json").read_text()) for seed in job.seeds
    ]
    return Finetuned(job, Text(**before["text"]), [BlockLinearity(**score) for score in before["scores"]], results)


def _track(finetuned: Finetuned, tracker: Tracker, parent: str) -> None:
    for result in finetuned.results:
        key = f"{parent}/seed-{result.seed}"
        tracker.start_run(key, name=f"seed {result.seed}", parent=parent, params={"seed": result.seed})
        linearity = {f"mean_{field}": result.mean(field) for field in MEASURES}
        tracker.log_metrics(key, {"accuracy": result.accuracy, "held_out_loss": result.held_out_loss, **linearity})
        tracker.log_tags(key, {"artefact": result.model})
        tracker.end_run(key, "FINISHED")
    changes = {f"change_{field}": finetuned.change(field)[0] for field in MEASURES}
    tracker.log_metrics(parent, changes)
    tracker.log_artifact(parent, finetuned.job.folder / "finetuning.json")
    tracker.end_run(parent, "FINISHED")


def tune_seed(job: FinetuningJob, seed: int) -> None:
    """What each Ray Train worker does: all ranks train and check, rank 0 measures linearity and writes."""
    import torch
    from shoal.corpus import load_corpus
    from shoal.models import load_model, load_tokenizer
    from shoal.moments import measure_moments

    context, folder = ray.train.get_context(), job.folder / f"seed-{seed}"
    torch.set_num_threads(max(1, int(job.run.cpus_per_worker)))
    device = ray.train.torch.get_device()
    model = load_model(job.model, revision=job.revision, dtype=job.dtype, device=device)
    tokenizer = load_tokenizer(job.model, revision=job.revision)
    windows = load_corpus(job.texts, tokenizer, model.config).calibration
    is_writer = context.get_world_rank() == 0
    before = job.folder / "before.json"
    if is_writer and not before.exists():
        scores = [dataclasses.asdict(score) for score in score_blocks(measure_moments(model, windows))]
        write_text(before, json.dumps({"text": windows.describe().model_dump(), "scores": scores}))
    run = FinetuningRun(
        model, tokenizer, job.load_examples(), job.finetuning,
        folder=folder / "checkpoints", seed=seed, world_size=context.get_world_size(),
    )  # fmt: skip
    run.train()
    accuracy = run.measure_accuracy()
    if not is_writer:
        return
    after = [dataclasses.asdict(score) for score in score_blocks(measure_moments(run.finish(), windows))]
    artefact = folder / "model"
    shutil.rmtree(artefact, ignore_errors=True)  # of a start that was cut off before its result
    run.save(artefact)
    result = SeedResult(seed=seed, scores=tuple(after), model=str(artefact), **accuracy)  # type: ignore[arg-type]
    write_text(folder / "result.json", result.model_dump_json(indent=2))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
