"""A KV cache of rows for continuous batching: every running request has a row, begins at column 0, and grows by itself.

One `KVCache` object holds the keys and values of all blocks, [rows, heads, columns, head size] each, and says where the
forward pass that comes next writes: one row's prompt, or one new token for each of the rows. Requests of any length
share a step without padding on the left, so what a row computes does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

# Columns of a step grow by so many: attention reads whole steps, and reads no further than the longest row.
COLUMN_STEP = 64
MIN_COLUMNS = 256


class KVCache(Cache):
    """The cache of some requests, given to the model in the place of its own.

    All rows are as long as the longest may become, and rows and columns are powers of two. `names` are the rows that are
    taken, in order, by the names that whoever took them gave.
    """

    def __init__(self, num_layers: int, max_rows: int, device: torch.device):
        self.max_rows = max_rows
        self.lengths = torch.zeros(max_rows, dtype=torch.long, device=device)
        self.names: list[int] = []
        self.needs: list[int] = []
        self.shape = (0, 0)
        self.columns = 0
        self.offset = 0
        self.row: int | None = None
        self._row_ids = torch.arange(max_rows, device=device)
        self.kv_layers = [KVCacheLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self.kv_layers))

    @property
    def num_cached(self) -> int:
        """Tokens that there is memory for."""
        return count_cached(self.shape)

    @property
    def token_bytes(self) -> int:
        """Memory of one token in all blocks, once a pass has shown what it is."""
        buffers = [buffer for layer in self.kv_layers for buffer in (layer.keys, layer.values) if buffer is not None]
        return sum(buffer.shape[1] * buffer.shape[3] * buffer.element_size() for buffer in buffers)

    def shape_with(self, *needs: int) -> tuple[int, int]:
        """Rows and columns if others are taken that may become so long: those that there are, as long as they fit."""
        rows, columns = fit_shape([*self.needs, *needs], self.max_rows)
        return self.shape if rows <= self.shape[0] and columns <= self.shape[1] else (rows, columns)

    def take(self, name: int, need: int) -> int:
        """Takes a row that may come to hold `need` tokens; returns its number."""
        self.shape = self.shape_with(need)
        self.names.append(name)
        self.needs.append(need)
        self.lengths[len(self.names) - 1] = 0
        return len(self.names) - 1

    def release(self, row: int, *, shrink: bool = False) -> None:
        """Frees a row; the last one moves into it. What is over four times what the others need is given back (with
        `shrink`: all that is over it)."""
        last = len(self.names) - 1
        length, old_length = int(self.lengths[last]), int(self.lengths[row])
        for layer in self.kv_layers:
            layer.move(last, row, length, old_length)
        self.lengths[row] = length
        for values in (self.names, self.needs):
            values[row] = values[last]
            values.pop()
        shape = fit_shape(self.needs, self.max_rows)
        if shrink or 4 * count_cached(shape) <= self.num_cached:
            self.shape = shape
            for layer in self.kv_layers:
                layer.resize()

    def start_prompt(self, row: int, offset: int, length: int) -> None:
        """The next pass writes `length` prompt tokens into `row` from column `offset`."""
        self.row, self.offset, self.columns = row, offset, offset + length
        self.lengths[row] = self.columns

    def start_step(self) -> None:
        """The next pass writes one token into each of the rows, after what they hold."""
        longest = int(self.lengths[: len(self.names)].max()) + 1
        self.row, self.columns = None, -(-longest // COLUMN_STEP) * COLUMN_STEP
        self.offset = self.columns - 1
        assert longest <= self.shape[1], "a row is longer than was said when it was taken"

    def write(self, buffer: Tensor, states_bhtd: Tensor) -> Tensor:
        """Puts new keys or values into a layer's buffer; returns those that the pass attends to."""
        if self.row is not None:
            buffer[self.row, :, self.offset : self.columns] = states_bhtd[0]
            # Without a past, the states themselves: the pass is then that of a model without this cache.
            return buffer[self.row : self.row + 1, :, : self.columns] if self.offset else states_bhtd
        rows = len(states_bhtd)
        buffer[self._row_ids[:rows], :, self.lengths[:rows]] = states_bhtd[:, :, 0]
        return buffer[:rows, :, : self.columns]


class KVCacheLayer(CacheLayerMixin):
    """One block's part of `KVCache`."""

    def __init__(self, cache: KVCache):
        super().__init__()
        self.cache = cache
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: buffers are made by the first update, and larger ones when they are needed."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, heads, columns, head size] to attend to, the new ones included."""
        self.keys, self.values = self._resized(self.keys, key_states), self._resized(self.values, value_states)
        return self.cache.write(self.keys, key_states), self.cache.write(self.values, value_states)

    def resize(self) -> None:
        """Takes the shape that all are to have, if a pass has shown what a token is."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self._resized(self.keys, self.keys), self._resized(self.values, self.values)

    def _resized(self, buffer: Tensor | None, states: Tensor) -> Tensor:
        rows, columns = self.cache.shape
        if buffer is not None and (buffer.shape[0], buffer.shape[2]) == self.cache.shape:
            return buffer
        # Zeros, for what is masked is still multiplied: by a weight of 0, which NaN would survive.
        resized = states.new_zeros((rows, states.shape[1], columns, states.shape[3]))
        if buffer is not None:
            rows, columns = min(rows, buffer.shape[0]), min(columns, buffer.shape[2])
            resized[:rows, :, :columns] = buffer[:rows, :, :columns]
        return resized

    def move(self, source: int, target: int, length: int, old_length: int) -> None:
        """Moves the first `length` columns of one row into another, which had `old_length`, and leaves zeros."""
        for buffer in (self.keys, self.values):
            if buffer is not None and target < len(buffer):
                if source != target:
                    buffer[target, :, :length] = buffer[source, :, :length]
                    buffer[target, :, length:old_length] = 0
                buffer[source, :, :length] = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a pass attends to, and the first of them."""
        return self.cache.columns, 0

    def get_seq_length(self) -> int:
        """The column of the pass's first token (of all rows: the last column, masks say what a row holds)."""
        return self.cache.offset

    def get_max_length(self) -> int:
        """−1: rows grow."""
        return -1


def fit_shape(needs: list[int], max_rows: int) -> tuple[int, int]:
    """Rows and columns for requests that may become so long."""
    return min(_round_up(len(needs)), max_rows), max(MIN_COLUMNS, _round_up(max(needs, default=0)))


def count_cached(shape: tuple[int, int]) -> int:
    """Tokens that rows and columns hold."""
    return shape[0] * shape[1]


def _round_up(number: int) -> int:
    """The next power of two."""
    return 1 << max(0, number - 1).bit_length()
