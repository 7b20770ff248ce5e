"""One trial: a Ray Train job whose workers make, distil, evaluate and store the model of one recipe.

The steps are those of `shoal.compress`; what trials share comes from the search's folder instead of being measured.
"""

from __future__ import annotations

import functools
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.checkpoints.store import save, save_point
from shoal.compression import (
    Stopwatch,
    choose,
    evaluate_all,
    fit,
    make_lesson,
    make_point,
    name_inputs,
    replace,
    thin_weights,
)
from shoal.distil.run import DistillationRun
from shoal.errors import Collapsed
from shoal.measure.perplexity import score_windows
from shoal.measure.size_and_speed import measure_size, measure_speeds
from shoal.measure.task_scores import compare_results, load_results
from shoal.point import TaskScore
from shoal.prepare import Preparation
from shoal.progress import Listener, ignore
from shoal.recipe import Distillation, Recipe
from shoal.replace.maps import Replacement
from shoal.text.corpus import Corpus
from shoal.units import whole_blocks
from shoal.value import fingerprint
from transformers import PreTrainedModel

from shoal_services.search.config import SearchConfig
from shoal_services.search.folder import RunFolder, TrialResult
from shoal_services.training.faults import limit_steps
from shoal_services.training.folder import OUT_OF_MEMORY, Status
from shoal_services.training.progress_file import ProgressFile
from shoal_services.training.ranks import Notice, end_all, read_state, report, tell, wait_for


def train_trial(job: dict[str, Any]) -> None:
    """What each Ray Train worker does with `job` = {config, root, key, assignment}: all ranks train, rank 0 writes.

    A model that collapses, or a recipe that the model cannot fulfil, ends the trial with that result, on whatever rank
    that is seen; any other error is raised, and Train starts the workers again from the last checkpoint. A trial that is
    stopped has its result already, and ends without another.
    """
    config, folder = SearchConfig.model_validate(job["config"]), RunFolder(Path(job["root"]))
    torch.set_num_threads(max(1, int(config.run.cpus_per_worker)))
    trial = Trial(config, folder, job["key"], job["assignment"])
    try:
        trial.run()
    except Stopped:
        pass
    except (Collapsed, ValueError, FloatingPointError) as error:
        status: Status = "collapsed" if isinstance(error, Collapsed) else "failed"
        result = TrialResult(key=job["key"], assignment=job["assignment"], status=status, reason=str(error))
        end_all(functools.partial(folder.write_result, result), error)


class Stopped(Exception):
    """The trial has a result: it was stopped while it ran."""


class Trial:
    """One worker's part of a trial."""

    def __init__(self, config: SearchConfig, folder: RunFolder, key: str, assignment: dict[str, Any]):
        self.config, self.folder, self.key, self.assignment = config, folder, key, assignment
        self.is_writer = ray.train.get_context().get_world_rank() == 0
        self.watch = Stopwatch()
        self.listen: Listener = ProgressFile(folder.trial(key) / "progress.json") if self.is_writer else ignore
        self.held_out_perplexity = float("nan")

    def run(self) -> None:
        """Load → choose and fit (or take the fit that another trial made) → distil → evaluate → store."""
        if tell(self.folder.has_ended(self.key)):  # stopped, before these workers were started again
            raise Stopped
        self.listen("load", 0, 1)
        with self.watch.time("load"):
            corpus = Corpus.load(self.folder.prepared / "corpus.safetensors")
            preparation = Preparation.load(self.folder.prepared, len(corpus.evaluation))
            device = ray.train.torch.get_device()
            streamed = self.config.run.streamed
            model = load_model(
                self.config.model, revision=self.config.revision, dtype=self.config.dtype, device=device, streamed=streamed
            )
        recipe = self.config.make_recipe(self.assignment)
        recipe = recipe.model_copy(update={"weights_sha256": (self.folder.prepared / "weights.sha256").read_text()})
        recipe = name_inputs(recipe, model, corpus)
        with self.watch.time("fit"):
            recipe, replacement = self._fit_once(recipe, model, corpus, preparation)
            student = replace(model, replacement)
        if recipe.weight_changes:
            with self.watch.time("thin"):
                thin_weights(recipe, student, corpus, listen=self.listen)
                _share_weights(student)
        size = measure_size(student, is_sparse=recipe.sparsity is not None)
        with self.watch.time("distil"):
            student = self._distil(recipe, student, model, corpus, preparation, size.num_parameters)
        if not self.is_writer:
            return
        with self.watch.time("evaluate"):
            evaluations = evaluate_all(student, corpus, preparation, listen=self._listen_for_the_end)
            self._require_alive(evaluations[0].perplexity, evaluations[0].dense_perplexity)
            speeds = (None, None) if streamed else tuple(measure_speeds([model, student]))
            tasks = self._measure_tasks(student)
        artefact = self.folder.model(self.key)
        if not artefact.exists():  # it is there if the workers died between here and the result
            with self.watch.time("store"):
                save(student, load_tokenizer(str(self.folder.prepared / "tokenizer")), artefact, recipe=recipe)
        point = make_point(recipe, evaluations, (measure_size(model), size), speeds, self.watch, student)
        point = save_point(artefact, point.model_copy(update={"tasks": tasks}))
        is_first = self.folder.write_result(
            TrialResult(
                key=self.key, assignment=self.assignment, status="finished", point=point,
                held_out_perplexity=self.held_out_perplexity,
            )
        )  # fmt: skip
        if not is_first:  # it was stopped, too late to be heard
            shutil.rmtree(artefact, ignore_errors=True)

    def _listen_for_the_end(self, stage: str, done: int, total: int) -> None:
        self.listen(stage, done, total)
        if self.folder.has_ended(self.key):
            raise Stopped

    def _measure_tasks(self, student: PreTrainedModel) -> tuple[TaskScore, ...]:
        """The student in the search's tasks, if it has any, beside the dense model."""
        if self.config.tasks is None:
            return ()
        from shoal.measure.tasks import load_tasks, measure_tasks

        self.listen("tasks", 0, 1)
        tokenizer = load_tokenizer(str(self.folder.prepared / "tokenizer"))
        results = measure_tasks(student, tokenizer, load_tasks(self.config.tasks.names), limit=self.config.tasks.limit)
        return compare_results(results, load_results(self.folder.dense_tasks))

    def _fit_once(
        self, recipe: Recipe, model: PreTrainedModel, corpus: Corpus, preparation: Preparation
    ) -> tuple[Recipe, Replacement]:
        """The replacement from `fits/`, put there by the first trial that needs it: all ranks choose, rank 0 fits."""
        file = self.folder.fits / f"{_fit_key(recipe)}.safetensors"
        if tell(not file.exists()):
            chosen = choose(recipe, model, corpus, preparation, kept_in=self.folder.fits, listen=self.listen)
            if self.is_writer:
                fit(chosen, model, corpus.calibration, preparation.moments, listen=self.listen).save(file)
        wait_for(file)  # hours, with a large model
        replacement = Replacement.load(file)
        return recipe.model_copy(update={"blocks": replacement.units, "num_replaced": len(replacement.units)}), replacement

    def _distil(
        self, recipe: Recipe, student: PreTrainedModel, model: PreTrainedModel, corpus: Corpus,
        preparation: Preparation, num_parameters: int,
    ) -> PreTrainedModel:  # fmt: skip
        """The distilled student; every check is reported with the sizes that the search's objectives need."""
        if recipe.distillation is None:
            scores = score_windows(student, corpus.selection, preparation.selection)
            self._report(
                {"step": 0, "held_out_perplexity": float(scores.nll.mean().exp()), "held_out_kl": float(scores.kl.mean())},
                num_parameters,
            )
            return student
        run = DistillationRun(
            student, model, make_lesson(corpus, preparation), self._spare_memory(recipe.distillation),
            replaced=whole_blocks(recipe.blocks or ()), keep_zeros=recipe.sparsity is not None, seed=recipe.seed,
        )  # fmt: skip
        self._train(run, num_parameters)
        return run.finish()

    def _train(self, run: DistillationRun, num_parameters: int) -> None:
        """Takes the steps, from the last checkpoint on; makes checkpoints at checks, and where a node has to go."""
        checked: dict[str, float] = {}
        if state := read_state():
            run.load_state_dict(state)
            checked = state["checked"]
        notice, saved_at = Notice(self.folder.trial(self.key) / "result.json"), time.monotonic()
        with limit_steps(self.config.run.step_limit_s) as live:
            for metrics in run:
                live()
                self.listen("distil", run.step, run.settings.num_steps)
                is_check = "held_out_perplexity" in metrics
                checked = metrics if is_check else checked
                due = time.monotonic() - saved_at >= self.config.run.checkpoint_every_s and not run.descent.is_done
                due = notice.comes() or (is_check and tell(due))
                if notice.is_stopped:
                    raise Stopped
                if is_check or due:  # Tune wants the numbers of a check: the last one's, where there is notice
                    state = run.state_dict() | {"checked": checked} if due else None
                    self._report(checked, num_parameters, state=state)
                    saved_at = time.monotonic() if due else saved_at

    def _spare_memory(self, settings: Distillation) -> Distillation:
        """The same steps, but in passes of one window where memory did not suffice before: the sum is the same."""
        faults = self.folder.read_faults(self.key)
        clamped = any(fault.startswith(OUT_OF_MEMORY) for fault in faults)
        return settings.model_copy(update={"windows_per_pass": 1}) if clamped else settings

    def _report(self, metrics: dict[str, float], num_parameters: int, *, state: dict | None = None) -> None:
        """Reports to Train, and so to Tune; with a state, also a checkpoint. Every rank calls this alike."""
        self.held_out_perplexity = metrics["held_out_perplexity"]
        aside = self.folder.trial(self.key) / "train"
        report({**metrics, "num_parameters": num_parameters, **_measure_system()}, state, aside)

    def _require_alive(self, perplexity: float, dense: float) -> None:
        ceiling = dense * self.config.search.max_perplexity_ratio
        if perplexity > ceiling:
            raise Collapsed(
                f"perplexity {perplexity:.4g} is over the ceiling {ceiling:.4g} "
                f"({self.config.search.max_perplexity_ratio:g} × dense {dense:.4g})"
            )


def _fit_key(recipe: Recipe) -> str:
    """Equal for recipes that have the same replacement before distillation."""
    fields = {
        "num_replaced", "parameters", "kv_cache", "parts", "blocks", "kind", "rank", "selection", "fit", "refit", "ridge"
    }  # fmt: skip
    return fingerprint(recipe.model_dump(mode="json", include=fields))


def _share_weights(student: PreTrainedModel) -> None:
    """Rank 0's weights for all: on another kind of processor, a tie of two weights may fall the other way."""
    if dist.is_initialized():
        for parameter in student.parameters():
            dist.broadcast(parameter.data, 0)


def _measure_system() -> dict[str, float]:
    """This worker's load, under the names that MLflow's pages group as system metrics."""
    process = psutil.Process()
    metrics = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/process_memory_megabytes": process.memory_info().rss / 1e6,
        "system/system_memory_usage_percentage": psutil.virtual_memory().percent,
    }
    if torch.cuda.is_available():
        metrics["system/gpu_memory_usage_megabytes"] = torch.cuda.max_memory_allocated() / 1e6
    return metrics
