"""A model's results in tasks, kept example by example, and compared with the dense model's on the same examples."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.checkpoints.names import recipe_of
from shoal.files import write_text
from shoal.point import TaskScore
from shoal.value import Value


class TaskResult(Value):
    """A model's score in a task. `values` are those of the examples if the score is their mean, else empty."""

    task: str
    metric: str
    num_examples: int
    score: float
    standard_error: float | None
    values: tuple[float, ...]


def save_results(file: Path, results: Sequence[TaskResult]) -> None:
    """Writes the results, those of the examples too, for later comparisons."""
    write_text(file, json.dumps([one.model_dump() for one in results]))


def load_results(file: Path) -> list[TaskResult]:
    """What `save_results` wrote."""
    return [TaskResult.model_validate(one) for one in json.loads(file.read_text())]


def compare_results(results: Sequence[TaskResult], dense: Sequence[TaskResult] | None = None) -> tuple[TaskScore, ...]:
    """The results as scores, beside the dense model's of the same tasks and metrics."""
    beside = {(one.task, one.metric): one for one in dense or ()}
    scores = []
    for one in results:
        other = beside.get((one.task, one.metric))
        score = TaskScore(**one.model_dump(exclude={"values"}))
        if other is not None:
            score = score.model_copy(
                update={
                    "dense_score": other.score,
                    "dense_standard_error": other.standard_error,
                    "difference_standard_error": _paired_error(one.values, other.values),
                }
            )
        scores.append(score)
    return tuple(scores)


def _paired_error(values: Sequence[float], dense: Sequence[float]) -> float | None:
    """The standard error of the mean difference, None if the values are not those of the same examples."""
    if len(values) != len(dense) or len(values) < 2:
        return None
    differences = [a - b for a, b in zip(values, dense, strict=True)]
    return statistics.stdev(differences) / math.sqrt(len(differences))


def load_beside(
    name: str, dense: str | None, *, dtype: str | None = None
) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """Model `name`, then `dense` or the dense model that its recipe names, with their tokenizers; if neither, it alone."""
    recipe = recipe_of(name)
    models: list[tuple[str, str | None]] = [(name, None)]
    if dense is not None:
        models.append((dense, None))
    elif recipe is not None:
        models.append((recipe.base_model, recipe.revision))
    for one, revision in models:
        yield load_model(one, revision=revision, dtype=dtype), load_tokenizer(one, revision=revision)
