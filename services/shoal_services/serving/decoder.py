"""One model, many requests a step: prompts into rows of the KV cache, then a token for every row at once."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from shoal.blocks import name_cache_argument, text_config
from torch import Tensor
from transformers import PreTrainedModel

from shoal_services.serving.packed import pack_linears
from shoal_services.serving.slots import Slots

Masks = Tensor | dict[str, Tensor] | None


class BatchedDecoder:
    """Logits of next tokens for up to `max_batch_size` requests. Row r is request r's, rows 0 … size−1 are taken.

    Raises ValueError for a model whose masks or positions cannot be given row by row (checked by comparing two
    requests in one step with each of them alone).
    """

    def __init__(self, model: PreTrainedModel, *, max_batch_size: int = 32, prefill_chunk: int = 512):
        self.model, self.prefill_chunk, self.max_batch_size = model, prefill_chunk, max_batch_size
        pack_linears(model, max_rows=max_batch_size)
        self._cache_argument = name_cache_argument(model)
        self._accepted = set(inspect.signature(model.forward).parameters)
        config = text_config(model)
        self._layer_types = set(getattr(config, "layer_types", None) or ())
        self._window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self.slots = Slots(config.num_hidden_layers, max_batch_size, model.device)
        self.size = 0
        self.max_context: int = getattr(config, "max_position_embeddings", None) or sys.maxsize
        self._make_masks = self._choose_masks()

    @torch.no_grad()
    def prefill(self, ids: list[int], *, all_logits: bool = False) -> Tensor:
        """Takes the next row for a prompt; logits of the token after it [1, V] (after each of its tokens [T, V])."""
        row, parts = self.size, []
        tokens = torch.tensor(ids, device=self.model.device)[None]
        self.slots.lengths[row] = 0
        for offset in range(0, len(ids), self.prefill_chunk):
            chunk = tokens[:, offset : offset + self.prefill_chunk]
            self.slots.start_prompt(row, offset, chunk.shape[1])
            positions = torch.arange(offset, offset + chunk.shape[1], device=self.model.device)[None]
            parts.append(self._forward(chunk, positions, self._make_masks(positions) if offset else None, all_logits))
        self.slots.lengths[row] = len(ids)
        self.size += 1
        return torch.cat(parts) if all_logits else parts[-1]

    @torch.no_grad()
    def step(self, tokens: list[int]) -> Tensor:
        """Feeds one token to every taken row; logits of the token after it [size, V]."""
        self.slots.start_step(self.size)
        positions = self.slots.lengths[: self.size, None]
        ids = torch.tensor(tokens, device=self.model.device)[:, None]
        logits = self._forward(ids, positions, self._make_masks(positions), False)
        self.slots.lengths[: self.size] += 1
        return logits

    def release(self, row: int) -> int:
        """Frees a row. The last row moves into it; returns that row's old number (`row` itself if it was the last)."""
        self.size -= 1
        if row != self.size:
            self.slots.move(self.size, row)
        return self.size

    def _forward(self, ids: Tensor, positions: Tensor, masks: Masks, all_logits: bool) -> Tensor:
        inputs: dict[str, Any] = {
            "position_ids": positions.contiguous(),
            "attention_mask": masks,
            "logits_to_keep": 0 if all_logits else 1,
        }
        given = {name: value for name, value in inputs.items() if name in self._accepted}
        given[self._cache_argument] = self.slots
        logits = self.model(input_ids=ids, use_cache=True, **given).logits
        return logits.flatten(0, 1) if all_logits else logits[:, -1]

    def _mask_columns(self, positions: Tensor, window: int | None) -> Tensor:
        """What each token may attend to [rows, 1, tokens, columns], as a bias: 0 or the dtype's lowest value."""
        columns = torch.arange(self.slots.columns, device=positions.device)
        seen = columns <= positions[..., None]
        if window is not None:
            seen &= columns > positions[..., None] - window
        bias = torch.zeros(seen.shape, dtype=self.model.dtype, device=positions.device)
        return bias.masked_fill_(~seen, torch.finfo(self.model.dtype).min)[:, None]

    def _bias_masks(self, positions: Tensor) -> Masks:
        """Ready-made masks, one for each type of layer where the family has several."""
        if not self._layer_types:
            return self._mask_columns(positions, self._window)
        windows = {"sliding_attention": self._window}
        return {name: self._mask_columns(positions, windows.get(name)) for name in self._layer_types}

    def _padding_masks(self, positions: Tensor) -> Masks:
        """Which columns a row holds [rows, columns]: for families that derive ALiBi biases from it."""
        columns = torch.arange(self.slots.columns, device=positions.device)
        return (columns <= positions[:, -1:]).long()

    def _choose_masks(self) -> Callable[[Tensor], Masks]:
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
            self.size = 0
        raise ValueError(
            f"{type(self.model).__name__} cannot be served in batches: two requests in one step get other logits than "
            f"alone {problems or ''}".rstrip()
        )

    def _agrees_alone(self, prompts: list[list[int]]) -> bool:
        alone = torch.stack([self._find_logits_alone(ids) for ids in prompts]).float()
        for ids in prompts:
            self.prefill(ids[:-1])
        together = self.step([ids[-1] for ids in prompts]).float()
        self.size = 0
        spread = (alone - alone.mean(-1, keepdim=True)).norm(dim=-1)
        error = (together - alone).norm(dim=-1) / spread
        # Rounding alone is 1e-6 in float32, and 0.1 after the 30 blocks of SmolLM2 in bfloat16; wrong masks are over 1.
        return bool(error.max() <= (1e-3 if self.model.dtype == torch.float32 else 0.3))

    @torch.no_grad()
    def _find_logits_alone(self, ids: list[int]) -> Tensor:
        """Logits [V] after `ids` from the model without any cache."""
        tokens = torch.tensor(ids, device=self.model.device)[None]
        return self.model(input_ids=tokens, use_cache=False).logits[0, -1]
