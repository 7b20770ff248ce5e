"""What came out of a sweep: each run's checks and blocks, and what the seeds of one λ have in common.

config.json                     what is trained; a second sweep of this name must agree, but may add λ and seeds
prepared/                       tokenizer and token windows, the same for all runs
trials/<key>/                   result.json, model/, checkpoint-<step>/ (if kept), train/ (while running)
pretraining.json  pretraining.html
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Self

from shoal.files import write_text
from shoal.paper.pretrain_recipe import PretrainRecipe, Regularizer
from shoal.texts import Text

from shoal_services.pretraining.config import PretrainConfig
from shoal_services.training.estimate import Estimate
from shoal_services.training.folder import TrialEnd, TrialFolder


class PretrainResult(TrialEnd):
    """How a run ended. If it finished: its checks in order, the linearity of every block at the end, and the model."""

    checks: tuple[dict[str, float], ...] = ()
    blocks: tuple[dict[str, Any], ...] = ()
    recipe: PretrainRecipe | None = None
    validation: Text | None = None
    linearity: Text | None = None
    num_parameters: int | None = None
    device: str | None = None
    seconds: float | None = None
    model: str | None = None

    def with_model(self, place: str) -> Self:
        return self.model_copy(update={"model": self.model and place})

    @property
    def regularizer(self) -> Regularizer:
        return Regularizer.of(self.assignment["kind"], self.assignment["weight"])


class PretrainFolder(TrialFolder[PretrainResult]):
    """The folder of one sweep."""

    result_class = PretrainResult

    def find_finished(self) -> list[PretrainResult]:
        """The runs that have come to their end."""
        return [result for result in self.read_results() if result.status == "finished"]


def group_runs(results: Sequence[PretrainResult]) -> dict[Regularizer, list[PretrainResult]]:
    """Finished runs by regulariser: none first, then by kind and weight; seeds in order."""
    ordered = sorted(results, key=lambda r: (r.regularizer.weight > 0, r.regularizer.kind, r.regularizer.weight))
    groups: dict[Regularizer, list[PretrainResult]] = {}
    for result in sorted(ordered, key=lambda r: r.assignment["seed"]):
        groups.setdefault(result.regularizer, []).append(result)
    return {one: groups[one] for one in dict.fromkeys(result.regularizer for result in ordered)}


def estimate(runs: Sequence[PretrainResult], field: str, *, check: int = -1) -> Estimate:
    """A field of the runs' checks, by default the last one, over the seeds."""
    return Estimate.of([run.checks[check][field] for run in runs])


def compare(runs: Sequence[PretrainResult], baseline: Sequence[PretrainResult], field: str) -> Estimate | None:
    """The difference to the unregularised run of the same seed (same first weights, same order of windows), over seeds.

    None if they have no seed in common.
    """
    plain = {run.assignment["seed"]: run.checks[-1][field] for run in baseline}
    differences = [run.checks[-1][field] - plain[seed] for run in runs if (seed := run.assignment["seed"]) in plain]
    return Estimate.of(differences) if differences else None


SCORES = ("mean_score", "mean_score_without_residual", "mean_held_out", "mean_held_out_without_residual")
FIELDS = ("validation_perplexity", *SCORES, "mean_removed", "mean_mapped")


def summarise(results: Sequence[PretrainResult]) -> list[dict[str, Any]]:
    """For every regulariser the final numbers: mean, standard error over seeds, and the difference to none."""
    groups = group_runs(results)
    baseline = groups.get(Regularizer(), [])
    rows = []
    for one, runs in groups.items():
        row: dict[str, Any] = {"kind": one.kind, "weight": one.weight, "num_seeds": len(runs)}
        for field in FIELDS:
            row[field] = vars(estimate(runs, field))
            difference = compare(runs, baseline, field)
            row[f"{field}_difference"] = vars(difference) if difference else None
        rows.append(row)
    return rows


def write_results(config: PretrainConfig, folder: PretrainFolder) -> list[PretrainResult]:
    """`pretraining.json`: the summary and every finished run. Returns the runs."""
    results = folder.find_finished()
    runs = [json.loads(folder.relative(result).model_dump_json()) for result in results]
    payload = {"name": config.name, "summary": summarise(results), "runs": runs}
    write_text(folder.root / "pretraining.json", json.dumps(payload, indent=2))
    return results


def describe_texts(results: Sequence[PretrainResult]) -> str:
    """What was measured on what, with hashes, in one sentence."""
    first = results[0]
    assert first.validation and first.linearity
    (v, lin) = (first.validation, first.linearity)
    return (
        f"Perplexity on {v.name}, {v.num_tokens:,} tokens (sha256 {(v.sha256 or '')[:8]}); linearity on {lin.name}, "
        f"{lin.num_tokens:,} tokens (sha256 {(lin.sha256 or '')[:8]}); neither was trained on. "
        f"{first.num_parameters or 0:,} parameters, on {first.device}."
    )
