"""The regularisers of pretraining (arXiv 2405.12250 §4): penalties on what each block changes in the residual stream.

    L_cosine = λ Σ_i (1 − cos(h_i, h_{i−1}))        L_MSE = λ Σ_i ‖h_i − h_{i−1}‖² / d

h_0 is what enters block 0 (the embeddings) and h_i the stream after i blocks, before the final norm. The paper does
not say what is summed and what is averaged: here the sum is over blocks, and every term a mean over tokens; of the
squared distance it is a mean over the d dimensions too, so that λ means the same for every width. Sinks count: were long
tokens left out, growing one would be a way around the penalty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from shoal.models.structure import watch_boundaries
from shoal.paper.pretrain_recipe import Regularizer


def cosine_regularizer(streams: Sequence[Tensor]) -> Tensor:
    """Σ_i (1 − cos(h_i, h_{i−1})), mean over tokens, for the streams [batch, time, d] at all boundaries."""
    return torch.stack([1 - functional.cosine_similarity(y, x, dim=-1).mean() for x, y in pairwise(streams)]).sum()


def mse_regularizer(streams: Sequence[Tensor]) -> Tensor:
    """Σ_i ‖h_i − h_{i−1}‖² / d, mean over tokens, for the streams [batch, time, d] at all boundaries."""
    return torch.stack([functional.mse_loss(y, x) for x, y in pairwise(streams)]).sum()


class Penalty:
    """Inside `watch(model)`, collects the boundaries of forward passes; `take()` is λ times the regulariser of them.

    Nothing is watched where λ is 0.
    """

    def __init__(self, regularizer: Regularizer):
        self.regularizer = regularizer
        self.streams: list[Tensor] = []

    @contextmanager
    def watch(self, model: PreTrainedModel) -> Iterator[None]:
        self.streams = []
        hooks = watch_boundaries(model, lambda _boundary, stream: self.streams.append(stream))
        with hooks if self.regularizer.weight else nullcontext():
            yield

    def take(self) -> Tensor | float:
        """The weighted penalty [], 0.0 where λ is 0."""
        if not self.streams:
            return 0.0
        find = cosine_regularizer if self.regularizer.kind == "cosine" else mse_regularizer
        return self.regularizer.weight * find([stream.float() for stream in self.streams])
