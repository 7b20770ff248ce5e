"""Least squares in closed form, from the sums of a `Gram`: no optimiser, float64 throughout.

Every map is y = x + M x + b with ridge toward M = 0, the identity on the stream: with few tokens that is closer to
the truth than ridge toward zero. Every projection that is fitted again has ridge toward its old value. The penalty
is λ times the mean variance of an *ordinary* token's coordinate, for each token; sinks would make the mean thousands
of times larger and shrink every useful direction. They are fitted, but λ is judged on ordinary tokens alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.linearity.gram import Gram
from shoal.linearity.moments import Moments
from shoal.replace.maps import AffineMap, Replacement
from shoal.units import find_runs

# The error over λ is flat for a decade on either side of its minimum: a coarse grid loses nothing. For `down_proj`, 10 and
# 100 would often have the least error and 2.6 % more perplexity (SmolLM2-135M, 6 blocks, 12,288 calibration tokens).
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def fit_affine(
    ordinary: Gram, sinks: Gram, *, held_out: Gram | None = None, ridge: float | None = None, rank: int | None = None
) -> AffineMap:
    """The affine map from x to y of the first pair, fitted with sinks.

    λ is `ridge`, or the best of `RIDGES` on `held_out`; then all sums are fitted. With `rank`, the update is the
    best of that rank for the fitted tokens (reduced-rank regression, Izenman 1975).
    """
    held = None if held_out is None else held_out.to_update()
    ordinary = ordinary.to_update()
    variance = _mean_variance(ordinary if held is None else ordinary + held)
    update_xy, everything = _fit(ordinary + sinks.to_update(), held, variance, ridge)
    if rank is None:
        factors: Tensor | tuple[Tensor, Tensor] = update_xy.T.contiguous()
        matrix = update_xy
    else:
        output, basis = _truncate(update_xy, everything.centred()[0], rank)
        matrix = basis @ output
        factors = (output.T.contiguous(), basis.T.contiguous())
    bias = _find_intercept(matrix, everything)
    as_float = tuple(f.float() for f in factors) if isinstance(factors, tuple) else factors.float()
    return AffineMap(as_float, bias.float())  # type: ignore[arg-type]


def _fit(gram: Gram, held_out: Gram | None, variance: Tensor, ridge: float | None) -> tuple[Tensor, Gram]:
    """M [d, e] of x → y of the first pair, rows times M, with ridge toward 0; and the sums of all tokens, which it fits.

    λ is `ridge`, or the best of `RIDGES` on the held-out tokens, which are fitted too once that is known.
    """
    if ridge is None:
        assert held_out is not None, "without ridge, held-out sums have to choose one"
        ridge = _choose_ridge(gram, held_out, variance)
    if held_out is not None:
        gram = gram + held_out
    return _solve(gram, ridge * variance), gram


def _choose_ridge(gram: Gram, held_out: Gram, variance: Tensor) -> float:
    """The best of `RIDGES` on the held-out tokens, from the largest down to where the error begins to grow."""
    best, least = RIDGES[-1], math.inf
    for ridge in reversed(RIDGES):
        error = _held_out_error(_solve(gram, ridge * variance), gram, held_out)
        if not error < least:
            break
        best, least = ridge, error
    return best


def _mean_variance(gram: Gram) -> Tensor:
    """Of the coordinates of x of the first pair."""
    xx, _, _ = gram.centred()
    return xx.trace() / gram.num_tokens[0].clamp(min=1) / len(xx)


def _solve(gram: Gram, penalty: Tensor) -> Tensor:
    xx, xy, _ = gram.centred()
    return _solve_positive(xx, xy, penalty * gram.num_tokens[0])


def _find_intercept(update_xy: Tensor, gram: Gram) -> Tensor:
    return (gram.sum_y[0] - gram.sum_x[0] @ update_xy) / gram.num_tokens[0]


def _solve_positive(gram: Tensor, target: Tensor, penalty: Tensor) -> Tensor:
    """(gram + penalty · I)⁻¹ target by Cholesky; by eigenvalues where the matrix is singular. Changes `gram`."""
    gram.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        return torch.cholesky_solve(target, factor)
    return torch.linalg.pinv(gram, hermitian=True) @ target


def _held_out_error(update_xy: Tensor, fitted: Gram, held: Gram) -> float:
    """Σ ‖y − ŷ‖² over held-out tokens, up to a constant, with the fitted tokens' intercept."""
    xx, xy, _ = held.centred()
    n, m = held.num_tokens[0].clamp(min=1), fitted.num_tokens[0]
    gap_x = held.sum_x[0] / n - fitted.sum_x[0] / m
    gap_y = held.sum_y[0] / n - fitted.sum_y[0] / m
    error = -2 * (update_xy * xy).sum() + (update_xy * (xx @ update_xy)).sum()
    return float(error + n * (gap_y - gap_x @ update_xy).square().sum())


def _truncate(update_xy: Tensor, xx: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (output [r, d], basis [d, r]) of the rank-r update that keeps most of the fitted variance."""
    if rank > len(xx):
        raise ValueError(f"rank={rank} is more than the hidden size {len(xx)}; choose a smaller rank or kind='linear'")
    fitted = update_xy.T @ xx @ update_xy
    _, vectors = torch.linalg.eigh((fitted + fitted.T) / 2)
    directions = vectors[:, -rank:]
    return directions.T, update_xy @ directions


def fit_projection(
    gram: Gram, weight: Tensor, bias: Tensor | None = None, *, held_out: Gram, ridge: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """The projection [out, in], and its bias if it has one, that adds the missing y of the first pair to what it makes.

    Ridge toward `weight`; λ is `ridge`, or the best of `RIDGES` on `held_out`, the sums of ordinary tokens alone. Sinks are
    in `gram`. A projection without bias gets none: it is fitted through the origin.
    """
    if bias is None:
        gram, held_out = gram.through_origin(), held_out.through_origin()
    update_zy, everything = _fit(gram, held_out, _mean_variance(held_out), ridge)
    fitted = weight.double() + update_zy.T
    return fitted, None if bias is None else bias.double() + _find_intercept(update_zy, everything)


def fit_independent(
    moments: Moments, blocks: tuple[int, ...], *, ridge: float | None = None, rank: int | None = None
) -> Replacement:
    """A map for each run of replaced blocks from one pass of moments: the maps of single blocks, composed.

    Quick, and good enough to rank. Maps fitted in order (`in_order.fit_in_order`) are clearly better.
    """
    maps: dict[int, AffineMap] = {}
    for run in find_runs(blocks):
        singles = [
            fit_affine(
                moments.ordinary[block], moments.sinks[block] + moments.held_sinks[block],
                held_out=moments.held_ordinary[block], ridge=ridge, rank=rank if len(run) == 1 else None,
            )
            for block in run
        ]  # fmt: skip
        maps[run.start] = singles[0] if len(run) == 1 else _compose(singles, moments, run, rank)
    return Replacement(tuple(sorted(blocks)), maps)


def _compose(singles: list[AffineMap], moments: Moments, run: range, rank: int | None) -> AffineMap:
    identity = torch.eye(len(singles[0].bias), dtype=torch.float64, device=singles[0].bias.device)
    matrix, bias = identity, torch.zeros_like(singles[0].bias, dtype=torch.float64)
    for single in singles:
        step = identity + single.matrix.double()
        matrix, bias = step @ matrix, step @ bias + single.bias.double()
    update = matrix - identity
    if rank is None:
        return AffineMap(update.float(), bias.float())
    first = moments.ordinary[run.start] + moments.held_ordinary[run.start]
    output, basis = _truncate(update.T, first.centred()[0], rank)
    mean = first.sum_x[0] / first.num_tokens[0]
    bias = bias + (update - output.T @ basis.T) @ mean
    return AffineMap((output.T.float().contiguous(), basis.T.float().contiguous()), bias.float())
