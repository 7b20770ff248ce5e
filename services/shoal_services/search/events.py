"""What a search's trials tell MLflow."""

from __future__ import annotations

import re
from typing import Any

from shoal.point import Point

from shoal_services.search.folder import TrialResult
from shoal_services.training.trial_events import TrialEvents


class SearchEvents(TrialEvents[TrialResult]):
    """A Tune callback for one search."""

    metrics = ("loss", "learning_rate", "gradient_norm", "held_out_kl", "held_out_perplexity", "num_parameters")

    def name_trial(self, assignment: dict[str, Any]) -> str:
        names = ("kind", "num_replaced", "parameters", "kv_cache", "weight_share", "sparsity")
        return " ".join(str(assignment[name]) for name in names if assignment.get(name) is not None) or "trial"

    def record_result(self, run: str, result: TrialResult) -> None:
        if result.point:
            self.tracker.log_metrics(run, point_metrics(result.point), step=_last_step(result.point))
            self.tracker.log_tags(run, {"artefact": result.point.artefact or "", "blocks": str(result.point.recipe.blocks)})
        for name in ("recipe.json", "point.json", "README.md"):
            self.tracker.log_artifact(run, self.folder.trial(result.key) / "model" / name)


def _last_step(point: Point) -> int:
    return point.recipe.distillation.num_steps if point.recipe.distillation else 0


def point_metrics(point: Point) -> dict[str, float]:
    """A point's numbers as MLflow metrics."""
    first = point.evaluations[0]
    metrics = {
        "perplexity": first.perplexity,
        "perplexity_standard_error": first.standard_error,
        "dense_perplexity": first.dense_perplexity,
        "kl": first.kl,
        "top1_agreement": first.top1_agreement,
        "num_parameters": float(point.size.num_parameters),
        "num_bytes": float(point.size.num_bytes),
        "kv_bytes_per_token": float(point.size.kv_bytes_per_token),
    }
    for score in point.tasks:
        metrics[re.sub(r"[^\w\-./ :]", "_", f"tasks/{score.task}/{score.metric}")] = score.score  # as MLflow allows
    for name, value in point.seconds.items():
        metrics[f"seconds/{name}"] = value
    if point.speed and point.dense_speed:
        metrics["decode_speedup"] = point.speed.decode_tokens_per_s / point.dense_speed.decode_tokens_per_s
        metrics["prefill_speedup"] = point.speed.prefill_tokens_per_s / point.dense_speed.prefill_tokens_per_s
    return metrics
