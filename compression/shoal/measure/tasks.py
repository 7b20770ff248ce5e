"""Scores in lm-eval's tasks (ARC, SuperGLUE, …) or in local task files, each beside the dense model's on the same examples.

A task is named by one of
    arc_easy  super-glue-lm-eval-v1   a task, tag or group that lm-eval knows; its data come from the Hub
    my-task.yaml                      a task file; `data_files` are looked for beside it first
    my-tasks/                         a folder of task files
"""

from __future__ import annotations

import difflib
import logging
import math
import statistics
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

try:
    import lm_eval
except ModuleNotFoundError as error:
    raise ValueError("tasks need the package lm-eval: pip install 'shoal[tasks]'") from error
import yaml
from datasets.exceptions import DatasetsError
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.measure.task_scores import TaskResult, compare_results, load_beside
from shoal.point import TaskScore

FEWSHOT_SEED = 1234  # lm-eval's own
# Of metrics that are no mean over examples; the others have a standard error in closed form.
NUM_BOOTSTRAPS = 1000
BATCH_SIZE = 8


def load_tasks(names: Sequence[str]) -> dict[str, Task]:
    """The tasks by name, those of groups and folders among them, with their data.

    Raises ValueError for a task that does not exist (it names the nearest), or whose data cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    local = [name for name in names if Path(name).suffix in (".yaml", ".yml") or Path(name).is_dir()]
    known = [name for name in names if name not in local]
    specs: list[str | dict[str, Any]] = [*known]
    for name in local:
        specs += _read_local(Path(name))
    manager = TaskManager(include_defaults=bool(known))  # lm-eval's own are thousands of files
    for name in known:
        if name not in manager.task_index:
            nearest = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
            raise ValueError(f"unknown task {name!r}; {hint}Tasks are lm-eval's own, .yaml files, and folders of them")
    tasks: dict[str, Task] = {}
    for spec in specs:
        label = spec["task"] if isinstance(spec, dict) else spec
        try:
            tasks |= manager.load([spec])["tasks"]
        except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
            raise ValueError(
                f"cannot load task {label!r}: {_explain(error)}; without the Hub, give a task file with local data"
            ) from error
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return tasks


def _read_local(path: Path) -> list[dict[str, Any]]:
    """The tasks of a file, or of a folder's files."""
    if not path.exists():
        raise ValueError(f"task file {str(path)!r} does not exist; check the path")
    configs = []
    for file in sorted(path.glob("*.yaml")) if path.is_dir() else [path]:
        try:
            config = load_yaml(file)
        except (yaml.YAMLError, ValueError, OSError) as error:
            raise ValueError(f"task file {str(file)!r} cannot be read: {_explain(error)}") from error
        if not isinstance(config.get("task"), str):
            if path.is_dir():
                continue  # a part that others include, or a group
            raise ValueError(f"task file {str(file)!r} has no key 'task' with the task's name")
        settings = config.get("dataset_kwargs") or {}
        if "data_files" in settings:
            settings["data_files"] = _look_beside(file.resolve().parent, settings["data_files"])
        configs.append(config)
    if not configs:
        raise ValueError(f"folder {str(path)!r} holds no task: no .yaml file in it has a key 'task'")
    return configs


def _look_beside(folder: Path, files: Any) -> Any:
    """Names of data files, made absolute where they lie in the folder."""
    if isinstance(files, dict):
        return {split: _look_beside(folder, inner) for split, inner in files.items()}
    if isinstance(files, list):
        return [_look_beside(folder, inner) for inner in files]
    return str(folder / files) if (folder / files).exists() else files


def measure_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, Task],
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[TaskResult]:
    """The model's score in every metric of every task, over the first `limit` examples of each."""
    for task in tasks.values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # each model is shown the same examples
    with redirect_stdout(sys.stderr):  # lm-eval prints; our output may be JSON
        outcome = lm_eval.evaluate(
            lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
            limit=limit, bootstrap_iters=NUM_BOOTSTRAPS, log_samples=True,
        )  # fmt: skip
    results = []
    for name in tasks:
        for key, score in outcome["results"][name].items():
            metric, _, chain = key.partition(",")
            if chain and not metric.endswith("_stderr") and isinstance(score, int | float):
                samples = [sample for sample in outcome["samples"][name] if sample["filter"] == chain]
                results.append(_make_result(name, metric, score, outcome["results"][name], chain, samples))
    return results


def _make_result(
    task: str, metric: str, score: float, scores: dict[str, Any], chain: str, samples: list[dict[str, Any]]
) -> TaskResult:
    """One metric's result from lm-eval's tables; `chain` is the filter that answers went through."""
    error = scores.get(f"{metric}_stderr,{chain}")
    values = [sample[metric] for sample in samples if isinstance(sample.get(metric), bool | int | float)]
    is_mean = len(values) == len(samples) > 0 and math.isclose(statistics.fmean(values), score, abs_tol=1e-9)
    return TaskResult(
        task=task,
        metric=metric if chain == "none" else f"{metric}, {chain}",
        num_examples=len(samples),
        score=float(score),
        standard_error=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
        values=tuple(map(float, values)) if is_mean else (),
    )


def evaluate_on_tasks(
    name: str, dense: str | None, task_names: Sequence[str], *, limit: int | None = None, dtype: str | None = None
) -> tuple[TaskScore, ...]:
    """Model `name` in tasks, beside `dense` or the dense model that its recipe names; alone if there is neither.

    lm-eval shows its progress on the error output. Raises ValueError for a model or a task that cannot be used.
    """
    tasks = load_tasks(task_names)
    return compare_results(
        *(measure_tasks(model, tokenizer, tasks, limit=limit) for model, tokenizer in load_beside(name, dense, dtype=dtype))
    )


def _explain(error: Exception) -> str:
    """The first line of what went wrong, and not the pages that may follow."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return next(iter(text.splitlines()), type(error).__name__)[:300] or type(error).__name__
