"""Pages about linearity: the blocks of one model with its least linear tokens, or several models side by side."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import plotly.graph_objects as go
from plotly.colors import qualitative
from shoal.files import write_text
from shoal.linearity.profile import Profile
from shoal.linearity.scores import RANKING_REASON, BlockLinearity
from shoal.linearity.token_errors import EDGES, NonlinearToken

from shoal_services.pages.axes import log_axis
from shoal_services.pages.page import draw, make_page, make_table

LINES = {
    "score": ("all tokens", "#999999"),
    "ordinary": ("sinks left out", "#56B4E9"),
    "held_out": ("held out, sinks left out (ranks)", "#0072B2"),
    "score_without_residual": ("without residual, all tokens", "#E69F00"),
    "ordinary_without_residual": ("without residual, sinks left out", "#D55E00"),
    "identity": ("identity map", "#009E73"),
}
LAYOUT = {
    "template": "plotly_white", "height": 520, "margin": {"t": 20, "r": 20}, "legend": {"orientation": "h", "y": -0.2},
}  # fmt: skip


def write_linearity_page(path: Path, name: str, scores: Sequence[BlockLinearity], profile: Profile | None = None) -> None:
    """One model's blocks; with its profile, also how the errors spread over tokens, and which tokens lead them."""
    write_text(path, make_page(f"{name}: linearity", _describe_stack(name, scores, profile)))


def write_comparison_page(path: Path, profiles: Sequence[Profile]) -> None:
    """Several models, or several revisions of one, in the order given: by depth, on average, and as a table.

    The two stacks of one model are shown in full below.
    """
    names = ", ".join(profile.label for profile in profiles)
    texts = sorted({f"{profile.text.name}, {profile.text.num_tokens:,} tokens" for profile in profiles})
    note = (
        f"Measured on {'; '.join(texts)}. Scores of arXiv 2405.12250, in sample, all tokens; means are over all blocks. "
        "“Change” is the difference to the first."
    )
    sections = [
        f"<h1>Linearity of {html.escape(names)}</h1>",
        draw(comparison_figure(profiles)),
        draw(mean_figure(profiles), with_library=False),
        f"<p class='note'>{html.escape(note)}</p>",
        make_table(*_comparison_rows(profiles), [False] * len(profiles)),
    ]
    for profile in profiles if is_one_model(profiles) else ():
        sections += _describe_stack(profile.label, profile.scores, profile, with_library=False)
    write_text(path, make_page("linearity compared", sections))


def is_one_model(profiles: Sequence[Profile]) -> bool:
    """Whether these are the stacks of one model, and not several models."""
    return len({profile.model for profile in profiles}) == 1 and len({profile.stack for profile in profiles}) == len(
        profiles
    )


def _describe_stack(
    name: str, scores: Sequence[BlockLinearity], profile: Profile | None, *, with_library: bool = True
) -> list[str]:
    note = f"Blocks are ranked by “held out”: {RANKING_REASON}. “All tokens” is the score of arXiv 2405.12250, in sample."
    sections = [
        f"<h1>{html.escape(name)}: linearity of the blocks</h1>",
        draw(linearity_figure(scores), with_library=with_library),
        f"<p class='note'>{note} Noise floor of the in-sample scores: {scores[0].noise_floor:.3f}.</p>",
        _block_table(scores, profile.token_errors if profile else None),
    ]
    if profile is not None:
        sections += [
            "<h2>Errors of single tokens</h2>",
            draw(error_figure(profile.error_counts), with_library=False),
            "<p class='note'>How many tokens are how far from their block’s best affine map, ‖ŷ − y‖ / ‖y‖. Both axes are "
            "logarithmic: what a mean hides is the long tail to the right.</p>",
            "<h2>The least linear tokens</h2>",
            _token_table(profile.nonlinear_tokens),
        ]
    return sections


def linearity_figure(scores: Sequence[BlockLinearity]) -> go.Figure:
    """All scores of one model over its blocks."""
    figure = go.Figure()
    for field, (name, colour) in LINES.items():
        figure.add_scatter(
            x=[s.block for s in scores], y=[getattr(s, field) for s in scores], mode="lines+markers", name=name,
            line={"color": colour}, visible=True if field not in ("score_without_residual", "identity") else "legendonly",
        )  # fmt: skip
    figure.update_layout(**LAYOUT, xaxis_title="block", yaxis_title="linearity (share of variance)")
    return figure


def error_figure(error_counts: Sequence[Sequence[int]]) -> go.Figure:
    """Histograms of the errors of single tokens, one line for each block."""
    middles = [(low * high) ** 0.5 for low, high in pairwise(EDGES)]
    figure = go.Figure()
    for block, counts in enumerate(error_counts):
        share = block / max(1, len(error_counts) - 1)
        figure.add_scatter(
            x=middles, y=[count or None for count in counts], mode="lines", name=f"block {block}",
            line={"color": f"hsl({240 - 200 * share:.0f}, 70%, 45%)", "shape": "hvh"},
        )  # fmt: skip
    seen = [middle for counts in error_counts for middle, count in zip(middles, counts, strict=True) if count]
    tokens = [count for counts in error_counts for count in counts if count]
    figure.update_layout(**LAYOUT, xaxis=log_axis("relative error", seen), yaxis=log_axis("tokens", tokens))
    return figure


def comparison_figure(profiles: Sequence[Profile]) -> go.Figure:
    """With residual (solid) and without (dashed) over normalised depth, a colour for each model."""
    figure = go.Figure()
    for index, profile in enumerate(profiles):
        depth = [score.block / max(1, len(profile.scores) - 1) for score in profile.scores]
        for field, dash, label in (("score", "solid", ""), ("score_without_residual", "dash", ", without residual")):
            figure.add_scatter(
                x=depth, y=[getattr(s, field) for s in profile.scores], mode="lines+markers",
                name=f"{html.escape(profile.label)}{label}",
                line={"color": qualitative.Safe[index % len(qualitative.Safe)], "dash": dash},
            )  # fmt: skip
    figure.update_layout(**LAYOUT, xaxis_title="normalised depth", yaxis_title="linearity (share of variance)")
    return figure


def mean_figure(profiles: Sequence[Profile]) -> go.Figure:
    """Mean scores in the order of the models: over the checkpoints of a training run, Fig. 2 of the paper."""
    names = [html.escape(profile.label) for profile in profiles]
    figure = go.Figure()
    for field, label in (("score", "with residual"), ("score_without_residual", "without residual")):
        means = [profile.mean(field) for profile in profiles]
        figure.add_scatter(x=names, y=means, mode="lines+markers", name=label)
    figure.update_layout(**{**LAYOUT, "height": 360}, yaxis_title="mean linearity of the blocks")
    return figure


def _comparison_rows(profiles: Sequence[Profile]) -> tuple[list[str], list[list[str]]]:
    header = ["model", "blocks", "mean", "change", "w/o residual", "change", "held out", "cosine", "norm ratio"]
    first, rows = profiles[0], []
    for profile in profiles:
        numbers = []
        for field in ("score", "score_without_residual"):
            numbers += [f"{profile.mean(field):.4f}", f"{profile.mean(field) - first.mean(field):+.4f}"]
        others = [f"{profile.mean(field):.4f}" for field in ("held_out", "cosine", "norm_ratio")]
        rows.append([profile.label, str(len(profile.scores)), *numbers, *others])
    return header, rows


def _block_table(scores: Sequence[BlockLinearity], token_errors: Sequence[Sequence[float]] | None) -> str:
    header = [
        "block", "held out", "all tokens", "w/o residual", "sinks out", "w/o residual, sinks out", "identity", "cosine",
        "norm ratio", "sinks",
    ]  # fmt: skip
    fields = (
        "held_out", "score", "score_without_residual", "ordinary", "ordinary_without_residual", "identity", "cosine",
    )  # fmt: skip
    rows = []
    for index, score in enumerate(scores):
        sinks = "moves them" if score.moves_sinks else ""
        numbers = [f"{getattr(score, field):.4f}" for field in fields]
        rows.append([str(score.block), *numbers, f"{score.norm_ratio:.3f}", sinks])
        if token_errors is not None:
            rows[-1] += [f"{error:.3f}" for error in token_errors[index]]
    if token_errors is not None:
        header += ["token error median", "90 %", "99 %", "max"]
    return make_table(header, rows, [False] * len(rows))


def _token_table(tokens: Sequence[NonlinearToken]) -> str:
    """The tokens in their text; line breaks are shown, since many of these tokens are line breaks."""
    header = ["token", "text before", "text after", "place in the window", "× median error", "worst block", "error there"]
    rows = [
        [
            *(text.replace("\n", "⏎") for text in (one.token, one.before, one.after)), str(one.position),
            f"{one.times_median:.1f}", str(one.block), f"{one.error:.3f}",
        ]
        for one in tokens
    ]  # fmt: skip
    return make_table(header, rows, [False] * len(rows))
