"""One run of a sweep: a Ray Train job whose workers train one model, measure it along the way and store it."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from shoal.checkpoints.load import load_tokenizer
from shoal.distil.descent import Diverged
from shoal.paper.pretrain import PretrainingRun, make_model, save_model
from shoal.paper.pretrain_corpus import PretrainCorpus
from shoal.progress import Listener, ignore

from shoal_services.pretraining.config import PretrainConfig
from shoal_services.pretraining.results import PretrainFolder, PretrainResult
from shoal_services.training.faults import limit_steps
from shoal_services.training.progress_file import ProgressFile
from shoal_services.training.ranks import Notice, end_all, read_state, report

REPORTED = 50
"""Reports of a run beside its checks."""


def pretrain_run(job: dict[str, Any]) -> None:
    """What each Ray Train worker does with `job` = {config, root, key, assignment}: all ranks train, rank 0 writes.

    A run that diverges ends with that result; any other error is raised, and Train starts the workers again from the
    last checkpoint.
    """
    config, folder = PretrainConfig.model_validate(job["config"]), PretrainFolder(Path(job["root"]))
    torch.set_num_threads(max(1, int(config.run.cpus_per_worker)))
    key, assignment = job["key"], job["assignment"]
    is_writer = ray.train.get_context().get_world_rank() == 0
    listen: Listener = ProgressFile(folder.trial(key) / "progress.json") if is_writer else ignore
    started_at = time.monotonic()
    corpus = PretrainCorpus.load(folder.prepared / "corpus.safetensors")
    tokenizer = load_tokenizer(str(folder.prepared / "tokenizer"))
    recipe = config.make_recipe(assignment)
    device = ray.train.torch.get_device()
    run = PretrainingRun(make_model(recipe, tokenizer, device=device), corpus, recipe)
    elapsed = _restore(run)
    num_steps = recipe.training.num_steps
    every = max(1, num_steps // REPORTED)
    try:
        notice = Notice(folder.trial(key) / "result.json")
        with limit_steps(config.run.step_limit_s) as live:
            for metrics in run:
                live()
                listen("pretrain", run.step, num_steps)
                checked = "validation_perplexity" in metrics
                due = notice.comes() or checked
                if not due and run.step % every:
                    continue
                state = run.state_dict() | {"seconds": elapsed + time.monotonic() - started_at} if due else None
                if checked and is_writer and config.run.keep_checkpoints:
                    _save_once(folder.trial(key) / f"checkpoint-{run.step:06d}", run, tokenizer, recipe)
                report(metrics, state, folder.trial(key) / "train")
    except Diverged as error:
        result = PretrainResult(key=key, assignment=assignment, status="collapsed", reason=str(error))
        end_all(functools.partial(folder.write_result, result), error)
        return
    if is_writer:
        _save_once(folder.model(key), run, tokenizer, recipe)
        folder.write_result(
            PretrainResult(
                key=key, assignment=assignment, status="finished", recipe=recipe, checks=tuple(run.checks),
                blocks=tuple(dataclasses.asdict(block) for block in run.blocks),
                validation=corpus.validation.describe(), linearity=corpus.linearity.describe(),
                num_parameters=sum(p.numel() for p in run.model.parameters()), device=device.type,
                seconds=elapsed + time.monotonic() - started_at, model=str(folder.model(key)),
            )
        )  # fmt: skip


def _save_once(place: Path, run: PretrainingRun, tokenizer, recipe) -> None:
    """Workers that died after a model was written find it there."""
    if not place.exists():
        save_model(place, run, tokenizer, recipe)


def _restore(run: PretrainingRun) -> float:
    """Goes on from the checkpoint, where workers died before; returns the seconds that it took to get there."""
    state = read_state()
    if state is None:
        return 0.0
    run.load_state_dict(state)
    return float(state["seconds"])
