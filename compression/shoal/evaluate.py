"""A model's perplexity with its standard error, its size and its speed, each beside the dense model's."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from shoal.blocks import find_zeros, name_cache_argument, text_config
from shoal.flow import read_logits
from shoal.losses import find_divergence, find_normalizer
from shoal.recipe import Evaluation, Size, Speed
from shoal.teacher import TeacherTargets, choose_batch_size, token_losses
from shoal.text import TokenWindows


class Collapsed(RuntimeError):
    """The model's loss is not finite, or so high that the model is of no use."""


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


@torch.no_grad()
def measure_size(model: PreTrainedModel, *, is_sparse: bool = False) -> Size:
    """Parameters, bytes of the weights as stored, and bytes that the KV cache grows by per token.

    Of a sparse model, the zeros in the projections of its blocks are no parameters; they are stored all the same.
    """
    parameters = {id(p): p for p in model.parameters()}.values()
    zeros = find_zeros(model) if is_sparse else {}
    num_bytes = sum(p.numel() * p.element_size() for p in parameters)
    num_zeros = sum(int(zero.sum()) for zero in zeros.values())
    mask_bytes = sum(math.ceil(zero.numel() / 8) for zero in zeros.values())
    cache = DynamicCache(config=text_config(model))
    ids = torch.zeros((1, 4), dtype=torch.long, device=model.device)
    model(input_ids=ids, use_cache=True, **{name_cache_argument(model): cache})
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    held = [tensor for tensor in kept if tensor is not None]
    return Size(
        num_parameters=sum(p.numel() for p in parameters) - num_zeros,
        num_bytes=num_bytes,
        num_bitmask_bytes=num_bytes - num_zeros * model.dtype.itemsize + mask_bytes if is_sparse else None,
        kv_bytes_per_token=sum(tensor.numel() * tensor.element_size() for tensor in held) // 4,
    )


@torch.no_grad()
def measure_speeds(
    models: list[PreTrainedModel], *, num_prompt: int = 256, num_new: int = 16, rounds: int = 3
) -> list[Speed]:
    """Prefill and decode speed of each model for one sequence, from the median over `rounds` of `num_new` tokens.

    The models take turns at every token, so that other load on the machine hits all alike. The prompt is shorter than
    `num_prompt` where the models' context is.
    """
    contexts = [getattr(text_config(model), "max_position_embeddings", None) for model in models]
    num_prompt = min([num_prompt, *(context - num_new for context in contexts if context)])
    prefills: list[list[float]] = [[] for _ in models]
    steps: list[list[float]] = [[] for _ in models]
    for round_index in range(rounds + 1):
        ids = [torch.arange(num_prompt, device=model.device)[None] % text_config(model).vocab_size for model in models]
        caches = [DynamicCache(config=text_config(model)) for model in models]
        for step in range(num_new + 1):
            for index, model in enumerate(models):
                seconds, ids[index] = _time_step(model, ids[index], caches[index])
                if round_index:  # the first round warms up
                    (steps if step else prefills)[index].append(seconds)
    return [
        Speed(prefill_tokens_per_s=num_prompt / statistics.median(prefill), decode_tokens_per_s=1 / statistics.median(step))
        for prefill, step in zip(prefills, steps, strict=True)
    ]


def _time_step(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> tuple[float, Tensor]:
    """Seconds for tokens `ids` [1, T], and the token [1, 1] that follows."""
    start = time.perf_counter()
    given: dict[str, Any] = {name_cache_argument(model): cache}
    token = model(input_ids=ids, use_cache=True, logits_to_keep=1, **given).logits.argmax(-1)
    _wait(model)
    return time.perf_counter() - start, token


def _wait(model: PreTrainedModel) -> None:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
