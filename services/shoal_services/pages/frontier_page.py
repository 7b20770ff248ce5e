"""The page of the size/quality frontier."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import plotly.graph_objects as go
from shoal.files import write_text
from shoal.frontier import find_frontier, name_picks
from shoal.point import Point
from shoal.recipe import KINDS, Recipe

from shoal_services.pages.axes import log_axis
from shoal_services.pages.page import PALETTE, draw, make_page, make_table

COLOURS = dict(zip(KINDS, PALETTE, strict=False))
SYMBOLS = dict(zip(KINDS, ("circle", "diamond", "square", "x"), strict=True))
# Open marks are sparse, marks with a dot have factored weights.
WEIGHTS = {(): "", ("SVD",): "-dot", ("sparse",): "-open", ("SVD", "sparse"): "-open-dot"}


def write_frontier_page(path: Path, name: str, points: Sequence[Point]) -> None:
    """All points and the frontier through them, beside the dense model, and a table of the frontier."""
    frontier = find_frontier(points)
    sections = [f"<h1>{html.escape(name)}: size and quality</h1>"]
    if not points:
        sections.append("<p>No trial has finished yet.</p>")
    else:
        note = (
            f"{describe_measurement(points[0])} Errors of compressed and dense model go together: the ratio in the table "
            "is far surer than the two bars suggest. Up and to the right is worse. Zeros of sparse weights are no "
            "parameters, but are among the MB, which are those of the weights as saved."
        )
        sections += [
            draw(frontier_figure(points, frontier)),
            f"<p class='note'>{note}</p>",
            _frontier_table(points, frontier),
        ]
    write_text(path, make_page(f"{name}: frontier", sections))


def describe_measurement(point: Point) -> str:
    """What a point's perplexity was measured on, as HTML."""
    text = point.evaluations[0].text
    return (
        f"Perplexity on {html.escape(text.name)}, {text.num_tokens:,} tokens (sha256 {(text.sha256 or '')[:8]}), "
        f"{point.recipe.dtype} on {point.device}. Bars are one standard error over windows."
    )


def frontier_figure(points: Sequence[Point], frontier: Sequence[Point]) -> go.Figure:
    """Parameters against perplexity (log axis)."""
    figure = go.Figure()
    figure.add_scatter(
        x=[p.num_parameters / 1e6 for p in frontier], y=[p.perplexity for p in frontier], mode="lines",
        line={"color": "#888", "shape": "hv"}, name="frontier", hoverinfo="skip",
    )  # fmt: skip
    for kind, weights in product(KINDS, WEIGHTS):
        group = [p for p in points if p.recipe.kind == kind and _weights_of(p.recipe) == weights]
        if group:
            figure.add_scatter(
                x=[p.num_parameters / 1e6 for p in group], y=[p.perplexity for p in group], mode="markers",
                name=", ".join([kind, *weights]),
                error_y={"array": [p.evaluations[0].standard_error for p in group], "thickness": 1, "width": 3},
                marker={"color": COLOURS[kind], "symbol": SYMBOLS[kind] + WEIGHTS[weights], "size": 11},
                hovertext=[_describe(p) for p in group], hoverinfo="text",
            )  # fmt: skip
    dense = points[0]
    figure.add_scatter(
        x=[dense.dense_size.num_parameters / 1e6], y=[dense.evaluations[0].dense_perplexity], mode="markers", name="dense",
        error_y={"array": [dense.evaluations[0].dense_standard_error], "thickness": 1, "width": 3},
        marker={"color": "#000", "symbol": "star", "size": 15},
        hovertext=f"dense: {dense.evaluations[0].dense_perplexity:.2f}", hoverinfo="text",
    )  # fmt: skip
    figure.update_layout(
        template="plotly_white", height=520, margin={"t": 20, "r": 20}, legend={"orientation": "h", "y": -0.2},
        xaxis_title="parameters (millions)",
        yaxis=log_axis("perplexity", span_errors(points)),
    )  # fmt: skip
    return figure


def span_errors(points: Sequence[Point]) -> list[float]:
    """Both ends of every error bar: those of the points' perplexity, and of the dense model's."""
    first = points[0].evaluations[0]
    measured = [(point.perplexity, point.evaluations[0].standard_error) for point in points]
    measured.append((first.dense_perplexity, first.dense_standard_error))
    # On a log axis no bar ends at 0 or below.
    return [max(value + sign * error, value / 2) for value, error in measured for sign in (-1, 0, 1)]


def _weights_of(recipe: Recipe) -> tuple[str, ...]:
    """The key of `WEIGHTS` for a recipe."""
    return (*(("SVD",) if recipe.weight_share is not None else ()), *(("sparse",) if recipe.sparsity is not None else ()))


def _describe(point: Point) -> str:
    recipe, first = point.recipe, point.evaluations[0]
    settings = recipe.distillation
    distilled = (
        f"distilled on {recipe.lesson}, learning rate {settings.learning_rate:.2g}, "
        f"temperature {settings.temperature:g}, trained {settings.trained}"
        if settings
        else "not distilled"
    )
    return "<br>".join(
        [
            f"<b>{recipe.changes}</b>: {', '.join(map(str, recipe.blocks or ()))}",
            f"perplexity {first.perplexity:.2f} ± {first.standard_error:.2f} (dense {first.dense_perplexity:.2f})",
            f"KL to dense {first.kl:.3f} ± {first.kl_standard_error:.3f} nats per token",
            f"{point.num_parameters / 1e6:.1f} M parameters, {point.size.num_bytes / 1e6:.1f} MB, "
            f"{point.size.kv_bytes_per_token:,} KV bytes per token",
            distilled,
        ]
    )


def _frontier_table(points: Sequence[Point], frontier: Sequence[Point]) -> str:
    picks = {id(point): name for name, point in reversed(name_picks(frontier).items())}
    dense = points[0]
    sizes = [f"{dense.dense_size.num_parameters / 1e6:.1f} M", f"{dense.dense_size.num_bytes / 1e6:.1f}"]
    rows = [["dense", "0", "", "", *sizes, *_dense_cells(dense)]]
    marked = [False]
    for point in reversed(frontier):
        first = point.evaluations[0]
        rows.append(
            [
                picks.get(id(point), ""),
                point.recipe.count_units().removesuffix(" blocks"),
                point.recipe.kind if point.recipe.replaces_blocks else "",
                ", ".join(point.recipe.weight_changes),
                f"{point.num_parameters / 1e6:.1f} M",
                f"{point.size.num_bytes / 1e6:.1f}",
                f"{first.perplexity:.2f} ± {first.standard_error:.2f}",
                f"{math.exp(first.log_ratio):.3f} ± {math.exp(first.log_ratio) * first.log_ratio_standard_error:.3f}",
                f"{first.kl:.3f} ± {first.kl_standard_error:.3f}",
                f"{point.size.kv_bytes_per_token:,}",
                _speedup(point),
            ]
        )
        marked.append(id(point) in picks)
    header = [
        "",
        "blocks replaced",
        "kind",
        "weights",
        "parameters",
        "MB",
        "perplexity",
        "ratio to dense",
        "KL",
        "KV bytes/token",
        "decode speed",
    ]
    return make_table(header, rows, marked)


def _dense_cells(point: Point) -> list[str]:
    first = point.evaluations[0]
    perplexity = f"{first.dense_perplexity:.2f} ± {first.dense_standard_error:.2f}"
    return [perplexity, "1", "0", f"{point.dense_size.kv_bytes_per_token:,}", "1"]


def _speedup(point: Point) -> str:
    if point.speed is None or point.dense_speed is None:
        return ""
    return f"× {point.speed.decode_tokens_per_s / point.dense_speed.decode_tokens_per_s:.2f}"
