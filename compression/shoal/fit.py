"""Affine maps in closed form, from the sums of a `Gram`: no optimiser, float64 throughout.

Every map is y = x + M x + b with ridge toward M = 0, the identity on the stream: with few tokens that is closer to
the truth than ridge toward zero. The penalty is λ times the mean variance of an *ordinary* token's coordinate;
sinks would make the mean thousands of times larger and shrink every useful direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.gram import Gram
from shoal.moments import Moments
from shoal.replace import AffineMap, Replacement, find_runs

# The error over λ is flat for a decade on either side of its minimum: a coarse grid loses nothing.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# λ of .5, .1 and .01 for down_proj gave perplexities within 3 % of each other (SmolLM2-135M, 6 blocks); .1 was lowest.
DOWN_PROJ_RIDGE = 0.1


def fit_affine(
    ordinary: Gram, sinks: Gram, *, held_out: Gram | None = None, ridge: float | None = None, rank: int | None = None
) -> AffineMap:
    """The affine map from x to y of the first pair, fitted with sinks.

    λ is `ridge`, or the best of `RIDGES` on `held_out`; then all sums are fitted. With `rank`, the update is the
    best of that rank for the fitted tokens (reduced-rank regression, Izenman 1975).
    """
    everything = ordinary + sinks
    if ridge is None:
        assert held_out is not None, "without ridge, fit_affine needs held-out sums to choose one"
        candidates = [_solve(everything, ordinary, candidate) for candidate in RIDGES]
        best = min(range(len(RIDGES)), key=lambda i: _held_out_error(candidates[i], everything, held_out))
        ridge = RIDGES[best]
    if held_out is not None:  # has done its work: λ is known, and all tokens fit the map
        everything, ordinary = everything + held_out, ordinary + held_out
    update_xy = _solve(everything, ordinary, ridge)
    n = everything.num_tokens[0]
    if rank is None:
        factors: Tensor | tuple[Tensor, Tensor] = update_xy.T.contiguous()
        matrix = update_xy
    else:
        output, basis = _truncate(update_xy, everything.centred()[0], rank)
        matrix = basis @ output
        factors = (output.T.contiguous(), basis.T.contiguous())
    bias = (everything.sum_y[0] - everything.sum_x[0]) / n - (everything.sum_x[0] / n) @ matrix
    as_float = tuple(f.float() for f in factors) if isinstance(factors, tuple) else factors.float()
    return AffineMap(as_float, bias.float())  # type: ignore[arg-type]


def _solve(gram: Gram, ordinary: Gram, ridge: float) -> Tensor:
    """M [d, d] of x → y − x (rows times M), with ridge toward 0."""
    xx, xy, _ = gram.centred()
    scale = ordinary.centred()[0].trace() / max(float(ordinary.num_tokens[0]), 1.0) * float(gram.num_tokens[0]) / len(xx)
    return _solve_positive(xx, xy - xx, ridge * scale)


def _solve_positive(gram: Tensor, target: Tensor, penalty: Tensor | float) -> Tensor:
    """(gram + penalty · I)⁻¹ target by Cholesky; by eigenvalues where the matrix is singular."""
    penalised = gram.clone()
    penalised.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(penalised)
    if not failed:
        return torch.cholesky_solve(target, factor)
    return torch.linalg.pinv(penalised, hermitian=True) @ target


def _held_out_error(update_xy: Tensor, fitted: Gram, held: Gram) -> float:
    """Σ ‖y − ŷ‖² over held-out tokens, up to a constant, with the fitted tokens' intercept."""
    xx, xy, _ = held.centred()
    target = xy - xx
    n, m = held.num_tokens[0].clamp(min=1), fitted.num_tokens[0]
    gap_x = held.sum_x[0] / n - fitted.sum_x[0] / m
    gap_y = (held.sum_y[0] - held.sum_x[0]) / n - (fitted.sum_y[0] - fitted.sum_x[0]) / m
    error = -2 * (update_xy * target).sum() + (update_xy * (xx @ update_xy)).sum()
    return float(error + n * (gap_y - gap_x @ update_xy).square().sum())


def _truncate(update_xy: Tensor, xx: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (output [r, d], basis [d, r]) of the rank-r update that keeps most of the fitted variance."""
    if rank > len(xx):
        raise ValueError(f"rank={rank} is more than the hidden size {len(xx)}; choose a smaller rank or kind='linear'")
    fitted = update_xy.T @ xx @ update_xy
    _, vectors = torch.linalg.eigh((fitted + fitted.T) / 2)
    directions = vectors[:, -rank:]
    return directions.T, update_xy @ directions


def fit_down_proj(gram: Gram, weight: Tensor, *, ridge: float = DOWN_PROJ_RIDGE) -> Tensor:
    """The projection [out, in] that adds the missing y of the first pair to what `weight` makes of inputs z.

    Ridge toward `weight`, λ relative to the mean diagonal of Σ z zᵀ; no intercept, as most models have no bias there.
    """
    zz = gram.xx[0]
    return (weight.T.double() + _solve_positive(zz, gram.xy[0], ridge * zz.trace() / len(zz))).T


def fit_independent(
    moments: Moments, blocks: tuple[int, ...], *, ridge: float | None = None, rank: int | None = None
) -> Replacement:
    """A map for each run of replaced blocks from one pass of moments: the maps of single blocks, composed.

    Quick, and good enough to rank. Maps fitted in order (`walk.fit_in_order`) are clearly better.
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
    return Replacement(blocks=tuple(sorted(blocks)), maps=maps)


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
