"""One model, many requests a step: prompts into rows of the KV cache, then a token for every row at once."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from shoal.large.memory import find_free_bytes
from shoal.models.structure import name_cache_argument, text_config
from torch import Tensor
from transformers import PreTrainedModel

from shoal_services.serving.engine.kv_cache import KVCache, count_cached, fit_shape
from shoal_services.serving.engine.packed import pack_linears

Masks = Tensor | dict[str, Tensor] | None
# Of the memory that is free once the model is loaded; activations take some too.
SHARE_OF_MEMORY = 0.8


class BatchedDecoder:
    """Logits of next tokens for up to `max_batch_size` requests. Row r is request r's, rows 0 … size−1 are taken.

    Each request says how long it may become, and the cache has room for it from the beginning. All share one cache, whose
    rows are as long as the longest, as long as that holds `max_cached` tokens at most; those too long for that have
    another beside it, and their step is a pass of its own.

    Raises ValueError for a model whose masks or positions cannot be given row by row (checked by comparing two
    requests in one step with each of them alone).
    """

    def __init__(
        self, model: PreTrainedModel, *, max_batch_size: int = 32, max_cached: int = sys.maxsize, prefill_chunk: int = 512
    ):
        self.model, self.prefill_chunk, self.max_batch_size = model, prefill_chunk, max_batch_size
        pack_linears(model, max_rows=max_batch_size)
        self._cache_argument = name_cache_argument(model)
        self._accepted = set(inspect.signature(model.forward).parameters)
        config = text_config(model)
        self._num_layers = config.num_hidden_layers
        self._layer_types = set(getattr(config, "layer_types", None) or ())
        self._window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self.caches: list[KVCache] = []
        self.num_embeddings = len(cast(Tensor, model.get_input_embeddings().weight))
        self.max_context: int = getattr(config, "max_position_embeddings", None) or sys.maxsize
        self.max_cached, self.token_bytes = max_cached, 0
        self._make_masks = self._choose_masks()
        if self.token_bytes:
            self.max_cached = min(max_cached, int(SHARE_OF_MEMORY * find_free_bytes(model.device)) // self.token_bytes)

    @property
    def size(self) -> int:
        """Rows that are taken."""
        return sum(len(cache.names) for cache in self.caches)

    def has_room(self, num_tokens: int) -> bool:
        """Whether a request that may become so long has room now. One that is alone always has."""
        if not self.caches:
            return True
        has_space = bool(self._find_cache(num_tokens)) or count_cached(fit_shape([num_tokens], 1)) <= self._num_free
        return self.size < self.max_batch_size and has_space

    def check_room(self, num_tokens: int) -> None:
        """Raises ValueError if the memory does not suffice for one request of that length."""
        if num_tokens > self.max_cached:
            raise ValueError(
                f"a context of {num_tokens} tokens takes {num_tokens * self.token_bytes / 2**30:.1f} GiB of KV cache, and "
                f"there is room for {self.max_cached} tokens; lower max_context"
            )

    def check_alive(self) -> None:
        """Raises what a prompt of one token raises: the device has failed then, or the model."""
        self.prefill([0])
        self.release(self.size - 1)

    @torch.no_grad()
    def prefill(self, ids: list[int], *, room: int = 0, read: Callable[[Tensor], object] | None = None) -> Tensor:
        """Takes the next row for a prompt, and for `room` tokens after it; logits of the token after the prompt [1, V].

        `read` gets the logits after each of its tokens, [t, V], piece by piece. If anything is raised, no row is taken.
        """
        cache = self._find_cache(len(ids) + room) or self._make_cache()
        row = cache.take(self.size, len(ids) + room)
        if row == 0:
            self.caches.append(cache)
        tokens = torch.tensor(ids, device=self.model.device)[None]
        try:
            for offset in range(0, len(ids), self.prefill_chunk):
                chunk = tokens[:, offset : offset + self.prefill_chunk]
                cache.start_prompt(row, offset, chunk.shape[1])
                positions = torch.arange(offset, offset + chunk.shape[1], device=self.model.device)[None]
                masks = self._make_masks(cache, positions) if offset else None
                logits = self._forward(cache, chunk, positions, masks, num_logits=0 if read else 1)[0]
                if read:
                    read(logits)
        except BaseException:
            self._free(cache, row, shrink=True)
            raise
        return logits[-1:]

    @torch.no_grad()
    def step(self, tokens: list[int]) -> Tensor:
        """Feeds one token to every taken row; logits of the token after it [size, V].

        If anything is raised, nothing has happened.
        """
        ids, parts = torch.tensor(tokens, device=self.model.device)[:, None], []
        for cache in self.caches:
            cache.start_step()
            positions = cache.lengths[: len(cache.names), None]
            parts.append(self._forward(cache, ids[cache.names], positions, self._make_masks(cache, positions))[:, -1])
        for cache in self.caches:
            cache.lengths[: len(cache.names)] += 1
        order = [name for cache in self.caches for name in cache.names]
        logits = torch.cat(parts) if len(parts) > 1 else parts[0]
        return logits if order == sorted(order) else logits[torch.tensor(order, device=logits.device).argsort()]

    def release(self, row: int) -> int:
        """Frees a row. The last row moves into it; returns that row's old number (`row` itself if it was the last)."""
        cache = next(cache for cache in self.caches if row in cache.names)
        self._free(cache, cache.names.index(row))
        last = self.size
        for cache in self.caches:
            cache.names[:] = [row if name == last else name for name in cache.names]
        return last

    def clear(self) -> None:
        """Frees all rows."""
        self.caches.clear()

    def _find_cache(self, num_tokens: int) -> KVCache | None:
        """The cache that has to grow least for a request that may become so long; None if there is no room in any."""

        def growth(cache: KVCache) -> int:
            return count_cached(cache.shape_with(num_tokens)) - cache.num_cached

        fitting = [cache for cache in self.caches if growth(cache) <= self._num_free]
        return min(fitting, key=lambda cache: (growth(cache), cache.shape), default=None)

    @property
    def _num_free(self) -> int:
        """Tokens by which caches may grow."""
        return self.max_cached - sum(cache.num_cached for cache in self.caches)

    def _make_cache(self) -> KVCache:
        # Two rows at least, for the comparison of two requests.
        return KVCache(self._num_layers, max(2, self.max_batch_size), self.model.device)

    def _free(self, cache: KVCache, row: int, *, shrink: bool = False) -> None:
        cache.release(row, shrink=shrink)
        if not cache.names:
            self.caches.remove(cache)

    def _forward(self, cache: KVCache, ids: Tensor, positions: Tensor, masks: Masks, num_logits: int = 1) -> Tensor:
        """Logits [rows, tokens, V] of the last `num_logits` tokens, or of all (0)."""
        inputs: dict[str, Any] = {
            "position_ids": positions.contiguous(), "attention_mask": masks, "logits_to_keep": num_logits,
        }  # fmt: skip
        given = {name: value for name, value in inputs.items() if name in self._accepted}
        given[self._cache_argument] = cache
        logits = self.model(input_ids=ids, use_cache=True, **given).logits
        # What could not be fed back is not to be picked.
        return logits[..., : self.num_embeddings]

    def _mask_columns(self, cache: KVCache, positions: Tensor, window: int | None) -> Tensor:
        """What each token may attend to [rows, 1, tokens, columns], as a bias: 0 or the dtype's lowest value."""
        columns = torch.arange(cache.columns, device=positions.device)
        seen = columns <= positions[..., None]
        if window is not None:
            seen &= columns > positions[..., None] - window
        bias = torch.zeros(seen.shape, dtype=self.model.dtype, device=positions.device)
        return bias.masked_fill_(~seen, torch.finfo(self.model.dtype).min)[:, None]

    def _bias_masks(self, cache: KVCache, positions: Tensor) -> Masks:
        """Ready-made masks, one for each type of layer where the family has several."""
        if not self._layer_types:
            return self._mask_columns(cache, positions, self._window)
        windows = {"sliding_attention": self._window}
        return {name: self._mask_columns(cache, positions, windows.get(name)) for name in self._layer_types}

    def _padding_masks(self, cache: KVCache, positions: Tensor) -> Masks:
        """Which columns a row holds [rows, columns]: for families that derive ALiBi biases from it."""
        columns = torch.arange(cache.columns, device=positions.device)
        return (columns <= positions[:, -1:]).long()

    def _choose_masks(self) -> Callable[[KVCache, Tensor], Masks]:
        """The way of giving masks under which two requests in one step get what each gets alone."""
        vocabulary = text_config(self.model).vocab_size
        # Tokens from all over the vocabulary: what comes first in it are special tokens, which no text has in a row.
        prompts = [[7919 * token % vocabulary for token in ids] for ids in (range(1, 6), range(7, 19))]
        problems = []
        for make_masks in (self._bias_masks, self._padding_masks):
            self._make_masks = make_masks
            try:
                if self._agrees_alone(prompts):
                    return make_masks
            except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError) as error:
                problems.append(f"{type(error).__name__}: {error}")
            finally:
                self.clear()
        raise ValueError(
            f"{type(self.model).__name__} cannot be served in batches: two requests in one step get other logits than "
            f"alone {problems or ''}".rstrip()
        )

    def _agrees_alone(self, prompts: list[list[int]]) -> bool:
        alone = torch.stack([self._find_logits_alone(ids) for ids in prompts]).float()
        for ids in prompts:
            self.prefill(ids[:-1], room=1)
        together = self.step([ids[-1] for ids in prompts]).float()
        self.token_bytes = self.caches[0].token_bytes
        spread = (alone - alone.mean(-1, keepdim=True)).norm(dim=-1)
        error = (together - alone).norm(dim=-1) / spread
        # Rounding alone is 1e-6 in float32, and 0.1 after the 30 blocks of SmolLM2 in bfloat16; wrong masks are over 1.
        return bool(error.max() <= (1e-3 if self.model.dtype == torch.float32 else 0.3))

    @torch.no_grad()
    def _find_logits_alone(self, ids: list[int]) -> Tensor:
        """Logits [V] after `ids` from the model without any cache."""
        tokens = torch.tensor(ids, device=self.model.device)[None]
        return self.model(input_ids=tokens, use_cache=False).logits[0, -1, : self.num_embeddings]
