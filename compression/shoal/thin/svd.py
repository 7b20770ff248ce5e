"""Weights of low rank for the blocks that stay: the rank-r weight that changes a projection's outputs least.

SVD-LLM (arXiv 2403.07378) decomposes W L, where X Xᵀ = L Lᵀ over the calibration inputs, and cuts the smallest singular
values off: ‖(W − W') X‖² is then the sum of their squares. With U the left vectors kept, W' = U Uᵀ W: the factors are
U and Uᵀ W, and L need not be inverted. Blocks are factored in order, on the stream that the ones before them leave.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.linearity.gram import multiply_rows
from shoal.models.modeling_shoal import factor
from shoal.models.projections import find_projections, weight_of
from shoal.models.structure import text_config
from shoal.text.windows import TokenWindows
from shoal.thin.projections import walk_projections

# Relative to the mean diagonal of X Xᵀ; ten times more, and again, until the matrix is positive definite: inputs may be
# fewer than dimensions, features may never be on, and a sink's square swallows small ones in a float32 sum.
RIDGE = 1e-9
# Ranks are multiples of it: what matrix hardware likes, and what 4:8 sparsity of a factor needs.
RANK_STEP = 8


@torch.no_grad()
def factor_weights(
    model: PreTrainedModel,
    windows: TokenWindows,
    share: float,
    *,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> None:
    """Puts factors in the place of each projection, with at most `share` of its parameters, in place.

    A projection stays whole if it is too small for a rank of 8. Raises ValueError if the model holds factors already, or
    if no projection is large enough. `on_progress` hears the blocks done.
    """
    if getattr(text_config(model), "factored_projections", None):
        raise ValueError("this model's weights are factored already; start from its dense model")
    projections, ranks = find_projections(model), {}
    for done, grams in enumerate(walk_projections(model, windows, lambda x_ti: multiply_rows(x_ti, x_ti)[0]), start=1):
        for name, gram_ii in grams.items():
            weight_oi = weight_of(projections[name])
            rank = choose_rank(weight_oi.shape[0], weight_oi.shape[1], share)
            if rank == 0:
                continue
            up_or, down_ri, _ = truncate(weight_oi, gram_ii, rank)
            factored = factor(model, name, rank)
            factored.down.weight.copy_(down_ri)
            factored.up.weight.copy_(up_or)
            if factored.up.bias is not None:
                factored.up.bias.copy_(projections[name].bias)
            ranks[name] = rank
        on_progress(done)
    if not ranks:
        raise ValueError(f"weight_share={share:g} leaves no projection a rank of {RANK_STEP}; give a larger share")
    text_config(model).factored_projections = ranks


def choose_rank(num_out: int, num_in: int, share: float) -> int:
    """The largest rank, in steps of 8, whose factors hold at most `share` of the parameters of [out, in]; 0 if none."""
    return int(share * num_out * num_in / (num_out + num_in)) // RANK_STEP * RANK_STEP


def truncate(weight_oi: Tensor, gram_ii: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factors [out, rank] and [rank, in] in float64, and the loss ‖(W − W') X‖² for inputs of XᵀX = `gram_ii`."""
    weight_oi = weight_oi.double()
    left_or, singular, _ = torch.linalg.svd(weight_oi @ find_root(gram_ii.double()), full_matrices=False)
    kept_or = left_or[:, :rank]
    return kept_or, kept_or.T @ weight_oi, float(singular[rank:].square().sum())


def find_root(gram_ii: Tensor) -> Tensor:
    """L with L Lᵀ = gram + the least ridge that is needed (Cholesky). Raises FloatingPointError for a gram not finite."""
    if not gram_ii.isfinite().all():
        raise FloatingPointError("the inputs of a projection are not finite: the model is broken")
    ridge = RIDGE * gram_ii.trace() / len(gram_ii) + torch.finfo(gram_ii.dtype).tiny
    while True:
        factor_ii, failed = torch.linalg.cholesky_ex(gram_ii + ridge * torch.eye(len(gram_ii)).to(gram_ii))
        if not failed:
            return factor_ii
        ridge = 10 * ridge
