"""A model's size, and its speed beside other models'."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from shoal.models.projections import find_zeros
from shoal.models.structure import name_cache_argument, text_config
from shoal.point import Size, Speed


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
