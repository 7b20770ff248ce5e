"""A KV cache of rows for continuous batching: every running request has a row, begins at column 0, and grows by itself.

One `Slots` object holds the keys and values of all blocks, [rows, heads, columns, head size] each, and says where the
forward pass that comes next writes: one row's prompt, or one new token for each of the first rows. Requests of any
length share a step without padding on the left, so what a row computes does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

# Columns grow in these steps: attention reads whole steps, and reads no further than the longest row.
COLUMN_STEP = 64


class Slots(Cache):
    """The cache of `num_rows` requests, given to the model in the place of its own."""

    def __init__(self, num_layers: int, num_rows: int, device: torch.device):
        self.num_rows = num_rows
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.columns = 0
        self.offset = 0
        self.row: int | None = None
        self._row_ids = torch.arange(num_rows, device=device)
        self.slot_layers = [SlotLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self.slot_layers))

    def start_prompt(self, row: int, offset: int, length: int) -> None:
        """The next pass writes `length` prompt tokens into `row` from column `offset`."""
        self.row, self.offset, self.columns = row, offset, offset + length

    def start_step(self, num_rows: int) -> None:
        """The next pass writes one token into each of the first `num_rows` rows, after what they hold."""
        longest = int(self.lengths[:num_rows].max()) + 1
        self.row, self.columns = None, -(-longest // COLUMN_STEP) * COLUMN_STEP
        self.offset = self.columns - 1

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        length = int(self.lengths[source])
        for layer in self.slot_layers:
            layer.move(source, target, length)
        self.lengths[target] = length

    def write(self, buffer: Tensor, states_bhtd: Tensor) -> Tensor:
        """Puts new keys or values into a layer's buffer; returns those that the pass attends to."""
        if self.row is not None:
            buffer[self.row, :, self.offset : self.columns] = states_bhtd[0]
            # Without a past, the states themselves: the pass is then that of a model without this cache.
            return buffer[self.row : self.row + 1, :, : self.columns] if self.offset else states_bhtd
        rows = len(states_bhtd)
        buffer[self._row_ids[:rows], :, self.lengths[:rows]] = states_bhtd[:, :, 0]
        return buffer[:rows, :, : self.columns]


class SlotLayer(CacheLayerMixin):
    """One block's part of `Slots`. Its buffers are as long as the longest row has been, in powers of two."""

    def __init__(self, slots: Slots):
        super().__init__()
        self.slots = slots
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: buffers are made by the first update, and longer ones when they are needed."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, heads, columns, head size] to attend to, the new ones included."""
        self.keys, self.values = (
            self._with_room(buffer, states) for buffer, states in ((self.keys, key_states), (self.values, value_states))
        )
        return self.slots.write(self.keys, key_states), self.slots.write(self.values, value_states)

    def _with_room(self, buffer: Tensor | None, states: Tensor) -> Tensor:
        if buffer is not None and buffer.shape[2] >= self.slots.columns:
            return buffer
        columns = max(256, 1 << (self.slots.columns - 1).bit_length())
        # Zeros, for what is masked is still multiplied: by a weight of 0, which NaN would survive.
        longer = states.new_zeros((self.slots.num_rows, states.shape[1], columns, states.shape[3]))
        if buffer is not None:
            longer[:, :, : buffer.shape[2]] = buffer
        return longer

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` columns of one row into another."""
        for buffer in (self.keys, self.values):
            if buffer is not None:
                buffer[target, :, :length] = buffer[source, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a pass attends to, and the first of them."""
        return self.slots.columns, 0

    def get_seq_length(self) -> int:
        """The column of the pass's first token (of all rows: the last column, masks say what a row holds)."""
        return self.slots.offset

    def get_max_length(self) -> int:
        """−1: rows grow."""
        return -1
