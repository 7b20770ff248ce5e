"""Moments in, linearity scores out.

The score of a block (arXiv 2405.12250 §3.1) is 1 − min_A ‖X̃A − Ỹ‖² over centred X, Y of unit Frobenius norm: the
share of the output's variance that one affine map explains. "Without residual" asks the same of the block's
update Y − X. Both come from one fit, because with A = I + M the residual is the same:

    1 − score = (1 − score_without_residual) · ‖(Y−X) centred‖² / ‖Y centred‖²
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.files import write_text
from shoal.linearity.accumulate import count_held_out
from shoal.linearity.gram import Gram
from shoal.linearity.moments import Moments
from shoal.models.structure import text_config
from shoal.text.windows import TokenWindows

RANKING = "held_out"
RANKING_REASON = "scored on tokens that the map was not fitted on, and without sinks, which alone lift a score to 0.99"
# Held-out scores of fewer tokens per dimension say more about the tokens than about the block.
MIN_TOKENS_PER_DIMENSION = 4
# A block that changes the largest norm ratio by more than this makes or erases sinks, which no linear map does:
# in SmolLM2-135M block 11 (× 114) and block 28 (× 0.37), in no other block from 3 to 27 less than × 0.5 or more than × 1.
SINK_JUMP = 2.5
# Ratio of pivots: their squares stay far above the rounding of float64.
WELL_CONDITIONED = 1e-5


@dataclass(frozen=True)
class BlockLinearity:
    """How linear one block is. Scores are shares of variance: 1 is exactly linear, higher is more linear.

    `score` and `score_without_residual` are the paper's: in sample, over all tokens. `ordinary` leaves sinks out.
    `held_out` is fitted on one half and scored on the other, sinks out: it ranks. `noise_floor` = d / (n − 1) is
    what the in-sample score reaches on random data. `identity` is the score of predicting y = x, sinks out.
    `norm_ratio` is the mean of ‖y−x‖/‖y‖, `cosine` that of cos(x, y). `sink_jump` is the factor by which the block
    changes the largest-to-median norm ratio.
    """

    block: int
    score: float
    score_without_residual: float
    ordinary: float
    ordinary_without_residual: float
    held_out: float
    held_out_without_residual: float
    noise_floor: float
    identity: float
    norm_ratio: float
    cosine: float
    sink_jump: float

    @property
    def moves_sinks(self) -> bool:
        """Whether the block makes or erases massive activations, so that no linear map replaces it."""
        return self.sink_jump > SINK_JUMP or self.sink_jump < 1 / SINK_JUMP


def score_blocks(moments: Moments, device: torch.device | None = None) -> list[BlockLinearity]:
    """The linearity of every block, computed on the device, or where the moments are.

    Raises ValueError if there are too few tokens for the hidden size: every score would be near 1.
    """
    require_tokens(moments)
    device = device or moments.similarity.device
    tokens = moments.ordinary.num_tokens.add(moments.held_ordinary.num_tokens).clamp(min=1).cpu()
    jumps = (moments.sink_norm_ratio[1:] / moments.sink_norm_ratio[:-1]).tolist()
    return [_score_block(moments, block, float(tokens[block]), jumps[block], device) for block in range(moments.num_blocks)]


def write_scores(path: Path, scores: Sequence[BlockLinearity]) -> None:
    """Writes scores as JSON, aside and renamed."""
    write_text(path, json.dumps([dataclasses.asdict(score) for score in scores], indent=2))


def read_scores(path: Path) -> list[BlockLinearity]:
    """What `write_scores` wrote. Raises ValueError if the file is damaged."""
    try:
        return [BlockLinearity(**score) for score in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"scores {str(path)!r} are damaged ({error}); delete the file to score again") from error


@dataclass(frozen=True)
class ScaledScores:
    """Mean scores over the blocks, sinks out, if every block's update alone were `factor` times as large."""

    factor: float
    ordinary: float
    held_out: float
    ordinary_without_residual: float
    held_out_without_residual: float


def score_scaled(moments: Moments, factors: Sequence[float]) -> list[ScaledScores]:
    """How the scores depend on the size of the updates: of y = x + factor · (y − x) for each block by itself.

    Exact, from the same sums: a block's input does not depend on its own update. The score without residual cannot
    change. Raises ValueError for too few tokens, or a factor that is not positive.
    """
    if wrong := [factor for factor in factors if not factor > 0]:
        raise ValueError(f"updates cannot be scaled by {wrong[0]}; choose a factor above 0")
    if factors:
        require_tokens(moments)
    found = []
    for factor in factors:
        rows = []
        for block in range(moments.num_blocks):
            fit = moments.ordinary[block].scale_update(factor)
            held = moments.held_ordinary[block].scale_update(factor)
            (ordinary, ordinary_without), (held_out, held_out_without) = score_gram(fit + held), score_held_out(fit, held)
            rows.append((ordinary, held_out, ordinary_without, held_out_without))
        found.append(ScaledScores(factor, *(statistics.fmean(column) for column in zip(*rows, strict=True))))
    return found


def require_tokens(moments: Moments) -> None:
    """Raises ValueError, with the number that is needed, if there are too few tokens for scores and maps."""
    per_half = int(min(moments.ordinary.num_tokens.min(), moments.held_ordinary.num_tokens.min()))
    _require_half(per_half, moments.num_tokens, moments.hidden_size)


def require_calibration(windows: TokenWindows, model: PreTrainedModel) -> None:
    """The same before the tokens are read, as far as their number tells: nobody knows yet how many are sinks."""
    per_half = count_held_out(len(windows)) * windows.ids.shape[1]
    _require_half(per_half, windows.num_tokens, text_config(model).hidden_size)


def _require_half(per_half: int, num_tokens: int, width: int) -> None:
    needed = MIN_TOKENS_PER_DIMENSION * width
    if per_half < needed:
        raise ValueError(
            f"{num_tokens:,} calibration tokens are too few for a hidden size of {width}: a map has that many "
            "columns to fit, and every block would look linear; "
            # The smaller half of a few windows is a third of them, and sinks do not count.
            f"give {4 * needed:,} tokens or more, and text that holds them"
        )


def _score_block(moments: Moments, block: int, num_tokens: float, jump: float, device: torch.device) -> BlockLinearity:
    fit, held = moments.ordinary[block].to(device), moments.held_ordinary[block].to(device)
    both = fit + held
    everything = both + moments.sinks[block].to(device) + moments.held_sinks[block].to(device)
    score, without = score_gram(everything)
    ordinary, ordinary_without = score_gram(both)
    held_out, held_out_without = score_held_out(fit, held)
    xx, xy, yy = both.centred()
    return BlockLinearity(
        block=block,
        score=score,
        score_without_residual=without,
        ordinary=ordinary,
        ordinary_without_residual=ordinary_without,
        held_out=held_out,
        held_out_without_residual=held_out_without,
        noise_floor=min(1.0, moments.hidden_size / (float(everything.num_tokens[0]) - 1)),
        identity=float(1 - (yy - 2 * xy.trace() + xx.trace()) / yy),
        norm_ratio=float(moments.norm_ratio_sum[block]) / num_tokens,
        cosine=float(moments.cosine_sum[block]) / num_tokens,
        sink_jump=jump,
    )


def score_gram(gram: Gram) -> tuple[float, float]:
    """The paper's score of one pair, with and without the residual, from its sums."""
    xx, xy, yy = gram.centred()
    unexplained = yy - (xy * solve_least_squares(xx, xy)).sum()
    update = yy - 2 * xy.trace() + xx.trace()
    return _share(unexplained, yy), _share(unexplained, update)


def score_held_out(fit: Gram, held: Gram) -> tuple[float, float]:
    """Both scores of the affine map fitted on `fit` and judged on `held`; they can be negative."""
    xx, xy, _ = fit.centred()
    weight = solve_least_squares(xx, xy)
    n = held.num_tokens[0].clamp(min=1)
    mean_x, mean_y = fit.sum_x[0] / fit.num_tokens[0], fit.sum_y[0] / fit.num_tokens[0]
    held_xx, held_xy, held_yy = held.centred()
    error = held_yy - 2 * (weight * held_xy).sum() + (weight * (held_xx @ weight)).sum()
    # The intercept is the fit half's too: its miss on the held-out means counts for every token.
    miss = (held.sum_y[0] / n - mean_y) - (held.sum_x[0] / n - mean_x) @ weight
    error = error + n * miss.square().sum()
    return _share(error, held_yy), _share(error, held_yy - 2 * held_xy.trace() + held_xx.trace())


def solve_least_squares(xx: Tensor, xy: Tensor) -> Tensor:
    """argmin_A ‖XA − Y‖² [d, e] from Gram matrices in float64; directions without variance get weight 0.

    By Cholesky (ten times faster), by eigenvalues where the matrix is close to singular.
    """
    factor, failed = torch.linalg.cholesky_ex(xx)
    diagonal = factor.diagonal()
    if not failed and diagonal.min() > WELL_CONDITIONED * diagonal.max():
        return torch.cholesky_solve(xy, factor)
    values, vectors = torch.linalg.eigh(xx)
    floor = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps * 16
    inverse = torch.where(values > floor, 1 / values.clamp(min=1e-300), 0)
    return vectors @ (inverse[:, None] * (vectors.T @ xy))


def _share(unexplained: Tensor, total: Tensor) -> float:
    return float(1 - unexplained / total) if float(total) > 0 else 1.0
