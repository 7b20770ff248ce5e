"""Pruning curves: quality over the number of changed blocks, a line for each way to change them.

Fig. 6 to 8 of arXiv 2405.12250.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from shoal.files import write_text
from shoal.point import Point, TaskScore
from shoal.recipe import Recipe

from shoal_services.pages.axes import log_axis
from shoal_services.pages.frontier_page import describe_measurement, span_errors
from shoal_services.pages.page import PALETTE, draw, make_page, make_table

LABELS = {"linear": "linear replacement", "low_rank": "low-rank replacement", "folded": "folding", "dropped": "removal"}
SYMBOLS = ("circle", "square", "diamond", "x", "triangle-up", "cross")
# Of a recipe, what does not make another curve.
WITHIN_CURVE = {"num_replaced", "blocks", "weights_sha256", "calibration", "distillation_text"}

Measurement = tuple[float, float | None]
"""A value and its standard error."""


@dataclass(frozen=True)
class Curve:
    """Points whose recipes differ in their blocks alone, fewest first."""

    label: str
    points: list[Point]


def group_curves(points: Sequence[Point]) -> list[Curve]:
    """A curve for each way to change blocks; where plain names are not enough, they name the settings that differ."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(repr(_settings(point.recipe)), []).append(point)
    recipes = [group[0].recipe for group in groups.values()]
    curves = []
    for group in groups.values():
        recipe = group[0].recipe
        namesakes = [_settings(other) for other in recipes if _describe(other) == _describe(recipe)]
        own = _settings(recipe).items()
        differing = [f"{name}={value}" for name, value in own if any(other[name] != value for other in namesakes)]
        curves.append(Curve(", ".join([_describe(recipe), *differing]), sorted(group, key=_count)))
    return sorted(curves, key=lambda curve: curve.label)


def _count(point: Point) -> int:
    return point.recipe.num_replaced


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What makes a curve, under flat names."""
    values = recipe.model_dump(exclude=WITHIN_CURVE)
    distillation = values.pop("distillation") or {}
    loss = distillation.pop("loss", {})
    return values | distillation | loss


def _describe(recipe: Recipe) -> str:
    label = LABELS[recipe.kind] + (f" ({recipe.rank})" if recipe.rank else "")
    if recipe.distillation is None:
        return label
    maps = recipe.kind in ("linear", "low_rank")
    trained = {"maps": "the maps", "lora": "the maps and LoRA" if maps else "LoRA", "blocks": "all blocks",
               "all": "all parameters"}  # fmt: skip
    return f"{label} + distillation of {trained[recipe.distillation.trained]}"


def write_curves_page(path: Path, name: str, points: Sequence[Point]) -> None:
    """Perplexity, and each task's score, over the number of changed blocks, drawn and as tables."""
    sections = [f"<h1>{html.escape(name)}: pruning curves</h1>"]
    if not points:
        sections.append("<p>No trial has finished yet.</p>")
    else:
        curves = group_curves(points)
        sections += [
            draw(perplexity_figure(curves)),
            f"<p class='note'>{describe_measurement(points[0])} All models read the same tokens, so their errors go "
            "together. Without changed blocks it is the dense model.</p>",
            _table(curves, _perplexity, _dense_perplexity(points[0]), digits=2),
        ]
        for task, metric in dict.fromkeys((score.task, score.metric) for point in points for score in point.tasks):
            sections += _task_sections(curves, task, metric)
    write_text(path, make_page(f"{name}: pruning curves", sections))


def _task_sections(curves: Sequence[Curve], task: str, metric: str) -> list[str]:
    def measurement(point: Point) -> Measurement | None:
        score = _find_score(point, task, metric)
        return (score.score, score.standard_error) if score else None

    score = next(score for curve in curves for point in curve.points if (score := _find_score(point, task, metric)))
    dense = None if score.dense_score is None else (score.dense_score, score.dense_standard_error)
    figure = _figure(curves, measurement, dense)
    figure.update_layout(yaxis={"title": html.escape(f"{task}, {metric}")})
    return [
        f"<h2>{html.escape(task)}</h2>",
        draw(figure, with_library=False),
        f"<p class='note'>{html.escape(metric)} over {score.num_examples:,} examples, ± one standard error.</p>",
        _table(curves, measurement, dense, digits=3),
    ]


def _find_score(point: Point, task: str, metric: str) -> TaskScore | None:
    return next((score for score in point.tasks if (score.task, score.metric) == (task, metric)), None)


def _perplexity(point: Point) -> Measurement:
    return point.perplexity, point.evaluations[0].standard_error


def _dense_perplexity(point: Point) -> Measurement:
    return point.evaluations[0].dense_perplexity, point.evaluations[0].dense_standard_error


def perplexity_figure(curves: Sequence[Curve]) -> go.Figure:
    """Perplexity (log axis) over the number of changed blocks, beside the dense model's."""
    points = [point for curve in curves for point in curve.points]
    axis = log_axis("perplexity", span_errors(points))
    return _figure(curves, _perplexity, _dense_perplexity(points[0])).update_layout(yaxis=axis)


def _figure(
    curves: Sequence[Curve], measure: Callable[[Point], Measurement | None], dense: Measurement | None
) -> go.Figure:
    """A line for each curve, and a dashed one for the dense model."""
    figure = go.Figure()
    for index, curve in enumerate(curves):
        rows = [(_count(point), *found) for point in curve.points if (found := measure(point))]
        figure.add_scatter(
            x=[count for count, _, _ in rows], y=[value for _, value, _ in rows], name=html.escape(curve.label),
            error_y={"array": [error for _, _, error in rows], "thickness": 1, "width": 3}, mode="lines+markers",
            line={"color": PALETTE[index % len(PALETTE)]}, marker={"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 9},
        )  # fmt: skip
    if dense is not None:
        most = max(_count(point) for curve in curves for point in curve.points)
        figure.add_scatter(
            x=[0, most], y=[dense[0]] * 2, error_y={"array": [dense[1]] * 2, "thickness": 1, "width": 3}, name="dense",
            mode="lines", line={"color": "#000", "dash": "dash"},
        )  # fmt: skip
    figure.update_layout(
        template="plotly_white", height=520, margin={"t": 20, "r": 20}, legend={"orientation": "h", "y": -0.15},
        xaxis={"title": "changed blocks"},
    )  # fmt: skip
    return figure


def _table(
    curves: Sequence[Curve], measure: Callable[[Point], Measurement | None], dense: Measurement | None, *, digits: int
) -> str:
    """A row for each number of blocks, a column for each curve; empty where no trial finished."""

    def write(measured: Measurement | None) -> str:
        if measured is None:
            return ""
        value, error = measured
        return f"{value:,.{digits}f}" + ("" if error is None else f" ± {error:,.{digits}f}")

    rows = [["0", *[write(dense)] * len(curves)]]
    for count in sorted({_count(point) for curve in curves for point in curve.points}):
        found = [next((point for point in curve.points if _count(point) == count), None) for curve in curves]
        rows.append([str(count), *(write(measure(point)) if point else "" for point in found)])
    return make_table(["changed blocks", *(curve.label for curve in curves)], rows, [False] * len(rows))
