"""One seed: a Ray Train job whose workers fine-tune the model, check it, measure its linearity and store it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.files import write_text
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.scores import require_calibration, score_blocks
from shoal.paper.finetune import FinetuningRun
from shoal.progress import Listener, ignore
from shoal.text.corpus import load_corpus
from shoal.text.windows import TokenWindows
from transformers import PreTrainedModel

from shoal_services.finetuning.config import FinetuneConfig
from shoal_services.finetuning.results import FinetuneFolder, FinetuneResult
from shoal_services.training.progress_file import ProgressFile
from shoal_services.training.ranks import wait_for


def finetune_run(job: dict[str, Any]) -> None:
    """What each Ray Train worker does with `job` = {config, root, key, assignment}: all ranks train, rank 0 writes.

    A run whose loss is not finite ends with that result; any other error is raised, and Train starts the workers again:
    they go on from the last checkpoint.
    """
    config, folder = FinetuneConfig.model_validate(job["config"]), FinetuneFolder(Path(job["root"]))
    torch.set_num_threads(max(1, int(config.run.cpus_per_worker)))
    key, context = job["key"], ray.train.get_context()
    is_writer = context.get_world_rank() == 0
    listen: Listener = ProgressFile(folder.trial(key) / "progress.json") if is_writer else ignore
    listen("load", 0, 1)
    device = ray.train.torch.get_device()
    model = load_model(config.model, revision=config.revision, dtype=config.dtype, device=device)
    tokenizer = load_tokenizer(config.model, revision=config.revision)
    windows = load_corpus(config.texts, tokenizer, model.config).calibration
    require_calibration(windows, model)
    if is_writer and not folder.before.exists():
        payload = {"text": windows.describe().model_dump(), "blocks": _measure(model, windows)}
        write_text(folder.before, json.dumps(payload))
    wait_for(folder.before)
    run = FinetuningRun(
        model, tokenizer, config.load_examples(), config.finetuning, folder=folder.trial(key) / "checkpoints",
        seed=job["assignment"]["seed"], world_size=context.get_world_size(), listen=listen,
    )  # fmt: skip
    run.train()
    result = FinetuneResult(key=key, assignment=job["assignment"], status="collapsed")
    try:
        measured = run.measure_accuracy()
    except FloatingPointError as error:
        result = result.model_copy(update={"reason": str(error)})
    else:
        artefact = folder.model(key)
        blocks = _measure(run.finish(), windows) if is_writer else []
        result = result.model_copy(
            update={"status": "finished", "blocks": tuple(blocks), "model": str(artefact), **measured}
        )
        if is_writer and not artefact.exists():
            run.save(artefact)
    if is_writer:
        folder.write_result(result)
        shutil.rmtree(folder.trial(key) / "checkpoints", ignore_errors=True)


def _measure(model: PreTrainedModel, windows: TokenWindows) -> list[dict[str, Any]]:
    return [dataclasses.asdict(score) for score in score_blocks(measure_moments(model, windows))]
