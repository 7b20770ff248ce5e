"""A model's perplexity with its standard error, its size and its speed, each beside the dense model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.errors import Collapsed
from shoal.large.streamed import read_logits
from shoal.measure.divergence import find_divergence, find_normalizer
from shoal.measure.targets import TeacherTargets, choose_batch_size, token_losses
from shoal.point import Evaluation
from shoal.text.windows import TokenWindows


class WindowScores(NamedTuple):
    """Means over each window's scored tokens [N]: loss in nats, divergence from the dense model, equal top token."""

    nll: Tensor
    kl: Tensor
    agreement: Tensor


@torch.no_grad()
def score_windows(
    model: PreTrainedModel,
    windows: TokenWindows,
    dense: TeacherTargets,
    *,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> WindowScores:
    """Per-window scores of `model` against the dense model's targets on the same windows."""
    dense.require(windows)
    batch_size = choose_batch_size(model, windows.ids.shape[1])
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows, ids, logits in read_logits(model, windows, batch_size, on_progress):
        normalizer, top_ids = find_normalizer(logits)
        top = dense.top_tokens(rows, logits.device)
        # The last position predicts a token beyond the window: it is not scored.
        log_probs = logits.gather(-1, top.ids).float() - normalizer[..., None]
        kl = find_divergence(log_probs, top)[:, :-1]
        agreement = (top_ids == top.ids[..., 0])[:, :-1].float()
        nll = token_losses(logits, normalizer, ids)
        # In float64 like the dense losses, so that the dense model beside itself differs by nothing.
        parts.append((nll.cpu().double().mean(1), kl.cpu().double().mean(1), agreement.cpu().double().mean(1)))
    return WindowScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def evaluate(
    model: PreTrainedModel,
    windows: TokenWindows,
    dense: TeacherTargets,
    *,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> Evaluation:
    """Perplexity over non-overlapping windows (a window's first token is not scored) beside the dense model's.

    Standard errors are over windows: tokens of one window are not independent. Raises ValueError for fewer than two
    windows, `Collapsed` if the loss is not finite.
    """
    require_two_windows(windows)
    scores = score_windows(model, windows, dense, on_progress=on_progress)
    dense_nll = dense.nll.double().mean(1)
    if not math.isfinite(float(scores.nll.mean())) or float(scores.nll.mean()) > 700:
        raise Collapsed(f"the loss on {windows.name!r} is {float(scores.nll.mean())}: the model is broken")
    (nll, nll_se), (dense_mean, dense_se) = mean_and_error(scores.nll), mean_and_error(dense_nll)
    (ratio, ratio_se), (kl, kl_se) = mean_and_error(scores.nll - dense_nll), mean_and_error(scores.kl)
    return Evaluation(
        text=windows.describe(),
        dense_perplexity=math.exp(dense_mean),
        dense_standard_error=math.exp(dense_mean) * dense_se,
        perplexity=math.exp(nll),
        standard_error=math.exp(nll) * nll_se,
        log_ratio=ratio,
        log_ratio_standard_error=ratio_se,
        kl=kl,
        kl_standard_error=kl_se,
        top1_agreement=float(scores.agreement.mean()),
    )


def require_two_windows(windows: TokenWindows) -> None:
    """Raises ValueError for fewer windows than a standard error needs."""
    if len(windows) < 2:
        raise ValueError(f"evaluation text {windows.name!r} fills {len(windows)} window; a standard error needs 2 or more")


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of values [N] and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))
