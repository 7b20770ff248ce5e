"""Tables for the terminal: a model's blocks, a frontier, one compressed model, tasks; each beside the dense model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from shoal.encoders import EncoderPoint
from shoal.frontier import name_picks
from shoal.linearity.profile import Profile
from shoal.linearity.scores import RANKING_REASON, BlockLinearity
from shoal.point import Evaluation, Point, TaskScore
from shoal.recipe import Recipe


def comparison_table(profiles: Sequence[Profile]) -> Table:
    """Mean scores of several models, and their difference to the first."""
    caption = "Means over the blocks. Scores of arXiv 2405.12250, in sample; in brackets the difference to the first."
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("model", "blocks", "with residual", "without residual", "held out", "cosine", "norm ratio"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for profile in profiles:
        cells = [
            f"{profile.mean(field):.4f}"
            for field in ("score", "score_without_residual", "held_out", "cosine", "norm_ratio")
        ]
        for index, field in enumerate(("score", "score_without_residual")):
            cells[index] += f" ({profile.mean(field) - profiles[0].mean(field):+.4f})"
        table.add_row(profile.label, str(len(profile.scores)), *cells)
    return table


def linearity_table(name: str, scores: Sequence[BlockLinearity]) -> Table:
    """The blocks of a model with their scores; the most linear third stands out."""
    caption = f"Ranked by “held out”: {RANKING_REASON}. Bold: the most linear third."
    table = Table(
        title=f"Linearity of {name}",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in ("block", "held out", "all tokens", "w/o residual", "identity", "cosine", "norm ratio", "note"):
        table.add_column(column, justify="left" if column == "note" else "right")
    linear = sorted(scores, key=lambda s: -s.held_out)[: len(scores) // 3]
    for score in scores:
        note = "moves sinks: stays" if score.moves_sinks else ""
        if score.held_out <= score.identity:
            note = note or "no map beats the identity"
        numbers = (
            score.held_out,
            score.score,
            score.score_without_residual,
            score.identity,
            score.cosine,
            score.norm_ratio,
        )
        table.add_row(str(score.block), *(f"{x:.4f}" for x in numbers), note, style="bold" if score in linear else None)
    return table


def scale_table(profile: Profile) -> Table:
    """Mean scores of a model if the updates of its blocks were of other sizes."""
    caption = (
        "Means over the blocks, sinks left out, if each block's update alone were so many times as large. Rank correlation "
        f"of a block's norm ratio with its held-out score: {_correlate(profile, 'held_out'):+.2f}, without residual "
        f"{_correlate(profile, 'held_out_without_residual'):+.2f}."
    )
    table = Table(title=profile.label, caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("× update", "in sample", "held out", "without residual", "without residual, held out"):
        table.add_column(column, justify="right")
    for one in profile.scaled:
        values = (one.ordinary, one.held_out, one.ordinary_without_residual, one.held_out_without_residual)
        table.add_row(f"{one.factor:g}", *(f"{value:.4f}" for value in values))
    return table


def _correlate(profile: Profile, field: str) -> float:
    """Spearman's rank correlation of the blocks' norm ratios with a score."""
    from scipy.stats import spearmanr  # takes a second

    return float(spearmanr([s.norm_ratio for s in profile.scores], [getattr(s, field) for s in profile.scores]).statistic)


def frontier_table(name: str, frontier: Sequence[Point]) -> Table:
    """The frontier below the dense model."""
    table = Table(
        title=f"Frontier of {name}",
        caption=_caption(frontier),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in ("", "−", "kind", "params", "MB", "perplexity", "× dense", "KL", "decode"):
        table.add_column(column, justify="left" if column in ("", "kind") else "right")
    if not frontier:
        return table
    dense, first = frontier[0], frontier[0].evaluations[0]
    table.add_row(
        "dense", "0", "", f"{dense.dense_size.num_parameters / 1e6:.1f}M", f"{dense.dense_size.num_bytes / 1e6:.0f}",
        f"{first.dense_perplexity:.2f} ± {first.dense_standard_error:.2f}", "1", "0", "×1",
    )  # fmt: skip
    names: dict[int, str] = {}
    for pick, point in name_picks(frontier).items():
        names[id(point)] = " ".join(filter(None, (names.get(id(point)), pick)))
    for point in reversed(frontier):
        table.add_row(names.get(id(point), ""), *frontier_cells(point))
    return table


def frontier_cells(point: Point) -> list[str]:
    """A point's row, but for its name."""
    first, recipe = point.evaluations[0], point.recipe
    speedup = ""
    if point.speed and point.dense_speed:
        speedup = f"×{point.speed.decode_tokens_per_s / point.dense_speed.decode_tokens_per_s:.2f}"
    return [
        recipe.count_units().removesuffix(" blocks"),
        describe_method(recipe),
        f"{point.num_parameters / 1e6:.1f}M",
        f"{point.size.num_bytes / 1e6:.0f}",
        f"{first.perplexity:.2f} ± {first.standard_error:.2f}",
        f"{math.exp(first.log_ratio):.2f} ± {math.exp(first.log_ratio) * first.log_ratio_standard_error:.2f}",
        f"{first.kl:.3f}",
        speedup,
    ]


def describe_method(recipe: Recipe) -> str:
    """The kind of replacement, and what was done to the weights of the blocks that stay."""
    kind = recipe.kind + (f"({recipe.rank})" if recipe.rank else "")
    return ", ".join([*([kind] if recipe.replaces_blocks else []), *recipe.weight_changes])


def _caption(frontier: Sequence[Point]) -> str:
    if not frontier:
        return "No trial has finished yet."
    point = frontier[0]
    text = point.evaluations[0].text
    return (
        "−: blocks replaced. Params without the zeros of sparse weights, MB with them, as saved. "
        f"Perplexity on {text.name}, {text.num_tokens:,} tokens, "
        f"{point.recipe.dtype} on {point.device}; "
        "± one standard error over windows (of × dense: paired). KL to dense in nats per token."
    )


def point_table(point: Point) -> Table:
    """One compressed model beside the dense one."""
    table = Table(title=f"{point.recipe.base_model}, {point.recipe.changes}")
    for column in ("", "dense", "compressed"):
        table.add_column(column, justify="left" if not column else "right")
    for e in point.evaluations:
        dense = f"{e.dense_perplexity:.2f} ± {e.dense_standard_error:.2f}"
        table.add_row(
            f"perplexity, {e.text.name} ({e.text.num_tokens:,})", dense, f"{e.perplexity:.2f} ± {e.standard_error:.2f}"
        )
        table.add_row("KL to dense, nats per token", "0", f"{e.kl:.4f} ± {e.kl_standard_error:.4f}")
        table.add_row("same top token", "100 %", f"{e.top1_agreement:.1%}")
    table.add_row("parameters", f"{point.dense_size.num_parameters:,}", f"{point.size.num_parameters:,}")
    table.add_row("weights, bytes", f"{point.dense_size.num_bytes:,}", f"{point.size.num_bytes:,}")
    if point.size.num_bitmask_bytes is not None:
        table.add_row(
            "bytes, if zeros were a bit each", f"{point.dense_size.num_bytes:,}", f"{point.size.num_bitmask_bytes:,}"
        )
    table.add_row(
        "KV cache, bytes per token", f"{point.dense_size.kv_bytes_per_token:,}", f"{point.size.kv_bytes_per_token:,}"
    )
    if point.speed and point.dense_speed:
        for label, field in (("prefill, tokens/s", "prefill_tokens_per_s"), ("decode, tokens/s", "decode_tokens_per_s")):
            table.add_row(label, f"{getattr(point.dense_speed, field):,.1f}", f"{getattr(point.speed, field):,.1f}")
    table.add_row("blocks replaced", "", " ".join(map(str, point.recipe.blocks or ())))
    return table


def cost_table(point: EncoderPoint) -> Table:
    """What a compressed encoder costs, beside the dense one."""
    caption = "± one standard error over windows (of the difference: paired)."
    table = Table(title=f"{point.recipe.base_model}, {point.recipe.changes}", caption=caption, caption_justify="left")
    for column in ("", "dense", "compressed", "difference"):
        table.add_column(column, justify="right" if column else "left")
    for cost in point.costs:
        table.add_row(
            f"{cost.measure}, {cost.text.name} ({cost.text.num_tokens:,})",
            f"{cost.dense:.4f} ± {cost.dense_standard_error:.4f}", f"{cost.value:.4f} ± {cost.standard_error:.4f}",
            f"{cost.difference:+.4f} ± {cost.difference_standard_error:.4f}",
        )  # fmt: skip
    change = point.num_parameters - point.dense_num_parameters
    table.add_row("parameters", f"{point.dense_num_parameters:,}", f"{point.num_parameters:,}", f"{change:+,}")
    table.add_row("blocks replaced", "", " ".join(map(str, point.recipe.blocks or ())), "")
    return table


def evaluation_table(name: str, evaluations: Sequence[Evaluation]) -> Table:
    """A model's quality on each text beside the dense model's."""
    caption = "± one standard error over windows (of the ratio: paired)."
    table = Table(
        title=name, caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for column in ("text", "tokens", "dense perplexity", "perplexity", "× dense", "KL", "same top token"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for e in evaluations:
        ratio = math.exp(e.log_ratio)
        table.add_row(
            e.text.name, f"{e.text.num_tokens:,}", f"{e.dense_perplexity:.2f} ± {e.dense_standard_error:.2f}",
            f"{e.perplexity:.2f} ± {e.standard_error:.2f}", f"{ratio:.3f} ± {ratio * e.log_ratio_standard_error:.3f}",
            f"{e.kl:.4f} ± {e.kl_standard_error:.4f}", f"{e.top1_agreement:.1%}",
        )  # fmt: skip
    return table


def task_table(name: str, scores: Sequence[TaskScore]) -> Table:
    """A model's scores in tasks beside the dense model's."""
    caption = "± one standard error over examples (of the difference: paired)."
    table = Table(
        title=name, caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for column in ("task", "metric", "examples", "dense", "score", "difference"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", overflow="fold")

    def write(value: float | None, error: float | None, form: str = ".3f") -> str:
        return "" if value is None else f"{value:{form}}" + ("" if error is None else f" ± {error:.3f}")

    for score in scores:
        table.add_row(
            score.task, score.metric, f"{score.num_examples:,}", write(score.dense_score, score.dense_standard_error),
            write(score.score, score.standard_error), write(score.difference, score.difference_standard_error, "+.3f"),
        )  # fmt: skip
    return table
