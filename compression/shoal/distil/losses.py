"""Distillation losses. Each is a mean over tokens.

B batch, T time, V vocabulary, K top tokens of the teacher, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from shoal.linearity.sinks import find_sinks, measure_norms
from shoal.recipe import LossWeights


def layer_mse(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared error of the streams [B, T, d] over ordinary tokens, summed over layers (arXiv 2405.12250 §5)."""
    return torch.stack([_mean_square(s.float() - t.float(), t).mean() for s, t in zip(student, teacher, strict=True)]).sum()


def square_head(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared error relative to the teacher's energy, over ordinary tokens, mean over layers (arXiv 2310.06927)."""
    ratios = []
    for s, t in zip(student, teacher, strict=True):
        ratios.append((_mean_square(s.float() - t.float(), t) / (_mean_square(t.float(), t) + 1e-6)).mean())
    return torch.stack(ratios).mean()


def _mean_square(values_btd: Tensor, teacher_btd: Tensor) -> Tensor:
    """The mean square [B] over the tokens of each window that are ordinary in the teacher's stream.

    One sink can have thousands of times the energy of all other tokens together, and would be all that is learned. Means
    are those of each window and not of a batch of them: passes and ranks, which share a batch out, would weigh its windows
    differently.
    """
    square_bt = values_btd.square().mean(-1)
    sink_bt = find_sinks(measure_norms(teacher_btd)[1]).view(square_bt.shape)
    return square_bt.masked_fill(sink_bt, 0).sum(1) / (~sink_bt).sum(1).clamp(min=1)


def cosine_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """1 − cosine between the streams of each token, mean over tokens and layers."""
    distances = [
        1 - functional.cosine_similarity(s.float(), t.float(), dim=-1).mean() for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(distances).mean()


def mix_losses(
    weights: LossWeights, *, divergence: Tensor | None, student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> Tensor:
    """The weighted sum of the losses whose weight is not 0."""
    terms = []
    if weights.logit_kl and divergence is not None:
        terms.append(weights.logit_kl * divergence)
    if weights.layer_mse:
        terms.append(weights.layer_mse * layer_mse(student, teacher))
    if weights.square_head:
        terms.append(weights.square_head * square_head(student, teacher))
    if weights.cosine:
        terms.append(weights.cosine * cosine_distance(student, teacher))
    return torch.stack(terms).sum()
