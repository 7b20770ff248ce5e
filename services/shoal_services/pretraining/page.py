"""The page of a sweep: linearity along training, at the end by block and over λ, and perplexity over λ."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.colors import qualitative
from shoal.files import write_text
from shoal.paper.pretrain_recipe import Regularizer

from shoal_services.pages.linearity_page import LAYOUT
from shoal_services.pages.page import draw, make_page, make_table
from shoal_services.pretraining.results import (
    Estimate,
    PretrainResult,
    compare,
    describe_texts,
    estimate,
    group_runs,
)

Groups = dict[Regularizer, list[PretrainResult]]
TITLES = {
    "mean_held_out_without_residual": "without residual, held out",
    "mean_score_without_residual": "without residual, in sample (the paper's)",
    "mean_held_out": "with residual, held out",
    "mean_score": "with residual, in sample (the paper's)",
}
COLUMNS = {
    "validation_perplexity": "perplexity",
    "mean_held_out": "with residual, held out",
    "mean_held_out_without_residual": "without, held out",
    "mean_removed": "loss without a block",
    "mean_mapped": "loss with its map",
}
NOTE = (
    "Points are means over seeds, bars one standard error over seeds. Linearity is the mean over the blocks of the share "
    "of variance that one affine map explains: “held out” is fitted on one half of the tokens and scored on the other, "
    "sinks left out; “in sample” is the score of arXiv 2405.12250. Runs of one seed begin with the same weights and see "
    "the same windows in the same order, so differences to λ = 0 (second lines) are taken seed by seed. “Loss without a "
    "block”: how much the validation loss rises in nats per token if one block is removed, mean over all but the first and "
    "the last; “with its map”: if the block’s best affine map stands there instead."
)


def write_pretraining_page(path: Path, name: str, results: Sequence[PretrainResult]) -> None:
    """All finished runs of a sweep."""
    sections = [f"<h1>{html.escape(name)}: what a regulariser does to linearity</h1>"]
    if not results:
        sections.append("<p>No run has finished yet.</p>")
    else:
        groups = group_runs(results)
        sections += [
            _final_table(groups),
            f"<p class='note'>{html.escape(describe_texts(results))} {html.escape(NOTE)}</p>",
            "<h2>Linearity along training</h2>",
            draw(course_figure(groups, "mean_held_out_without_residual")),
            draw(course_figure(groups, "mean_held_out"), with_library=False),
            "<h2>Linearity at the end, over λ</h2>",
            draw(weight_figure(groups, tuple(TITLES), "mean linearity of the blocks"), with_library=False),
            "<h2>Validation perplexity, over λ</h2>",
            draw(weight_figure(groups, ("validation_perplexity",), "perplexity"), with_library=False),
            "<h2>Linearity at the end, block by block</h2>",
            draw(block_figure(groups, "held_out_without_residual"), with_library=False),
        ]
    write_text(path, make_page(f"{name}: pretraining", sections))


def course_figure(groups: Groups, field: str) -> go.Figure:
    """A mean score at every check, a line for each regulariser."""
    figure = go.Figure()
    for index, (one, runs) in enumerate(groups.items()):
        steps = [check["step"] for check in runs[0].checks]
        found = [estimate(runs, field, check=position) for position in range(len(steps))]
        figure.add_scatter(x=steps, y=_means(found), error_y=_bars(found), name=_name(one), **_look(index))
    return figure.update_layout(**LAYOUT, xaxis_title="step", yaxis_title=f"mean linearity, {TITLES[field]}")


def weight_figure(groups: Groups, fields: Sequence[str], title: str) -> go.Figure:
    """Final values over λ, the weights of each kind in order, a line for each field and kind; λ = 0 begins both kinds."""
    figure = go.Figure()
    kinds = [kind for kind in ("cosine", "mse") if any(one.kind == kind for one in groups)] or ["none"]
    look = 0
    for field in fields:
        for kind in kinds:
            chosen = {one: runs for one, runs in groups.items() if one.kind in (kind, "none")}
            found = [estimate(runs, field) for runs in chosen.values()]
            figure.add_scatter(
                x=[one.weight for one in chosen], y=_means(found), error_y=_bars(found),
                name=f"{kind}: {TITLES[field]}" if field in TITLES else kind,
                visible=True if len(fields) == 1 or "held_out" in field else "legendonly", **_look(look),
            )  # fmt: skip
            look += 1
    return figure.update_layout(**LAYOUT, xaxis_title="λ", yaxis_title=title)


def block_figure(groups: Groups, field: str) -> go.Figure:
    """A score of every block at the end: Fig. 4 of the paper."""
    figure = go.Figure()
    for index, (one, runs) in enumerate(groups.items()):
        blocks = [block["block"] for block in runs[0].blocks]
        found = [Estimate.of([run.blocks[block][field] for run in runs]) for block in blocks]
        figure.add_scatter(x=blocks, y=_means(found), error_y=_bars(found), name=_name(one), **_look(index))
    return figure.update_layout(
        **LAYOUT, xaxis={"title": "block", "dtick": 1}, yaxis_title="linearity, without residual, held out"
    )


def _name(one: Regularizer) -> str:
    return "λ = 0" if one.kind == "none" else f"{one.kind}, λ = {one.weight:g}"


def _means(found: Sequence[Estimate]) -> list[float]:
    return [one.mean for one in found]


def _bars(found: Sequence[Estimate]) -> dict:
    return {"array": [one.standard_error or 0.0 for one in found], "thickness": 1, "width": 3}


def _look(index: int) -> dict:
    return {"mode": "lines+markers", "line": {"color": qualitative.Safe[index % len(qualitative.Safe)]}}


def _final_table(groups: Groups) -> str:
    """A row for each regulariser; below each number its difference to λ = 0."""
    rows = []
    baseline = groups.get(Regularizer(), [])
    for one, runs in groups.items():
        row = [_name(one), str(len(runs))]
        for field in COLUMNS:
            digits = 2 if field == "validation_perplexity" else 4
            difference = compare(runs, baseline, field) if one.weight else None
            below = f"\n{difference.text(digits, sign=True)}" if difference else ""
            row.append(estimate(runs, field).text(digits) + below)
        rows.append(row)
    return make_table(["", "seeds", *COLUMNS.values()], rows, [one.kind == "none" for one in groups])
