"""One streaming pass over text fills the moments, a batch at a time; of a model on disk, a block at a time.

b batch, t time, d hidden size, n = b·t tokens, l boundaries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.checkpoints.hashes import sample_weights
from shoal.large.on_disk import is_on_disk, zeros_off_memory
from shoal.large.streamed import StreamedPass
from shoal.linearity.moments import Moments
from shoal.linearity.sinks import find_sinks, measure_norms
from shoal.models.structure import Stack, find_stacks, text_config
from shoal.text.windows import TokenWindows

WINDOWS_AT_ONCE = 8


def count_held_out(num_windows: int) -> int:
    """How many of so many windows come into the held-out half, which is never the larger one."""
    batch_size = max(1, min(WINDOWS_AT_ONCE, num_windows // 2))
    return sum(min(batch_size, num_windows - start) for start in range(batch_size, num_windows, 2 * batch_size))


@torch.no_grad()
def measure_moments(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    stack: Stack | None = None,
    batch_size: int = WINDOWS_AT_ONCE,
    text_sha256: str | None = None,
    save_to: Path | None = None,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> Moments:
    """The moments of `windows` [num_windows, window] in one pass; batches alternate between fit and held-out half.

    They are those of the model's first stack of blocks, or of `stack`, one of its others.

    Moments add if they are of one model and one text: for shards, `text_sha256` is that of the whole text.
    With `save_to`, progress is kept there every 16 batches and the pass goes on from it when called again.
    `on_progress` hears the number of windows done. Where the model's blocks are on disk, so are the moments.
    """
    # A window of its own half each, even where there are few windows.
    batch_size = max(1, min(batch_size, len(windows) // 2))
    first = find_stacks(model)[0]
    stack = stack or first
    part = "" if stack.name == first.name else f".{stack.name}"
    source = f"{type(model).__name__}{part}:{sample_weights(model)}:{text_sha256 or windows.sha256}"
    if is_on_disk(model):
        return _measure_streamed(model, windows, batch_size, source, on_progress)
    moments = Moments.zeros(len(stack.blocks), text_config(model).hidden_size, source, model.device)
    if save_to and save_to.exists():
        moments = _resume(save_to, moments)
    for start in range(moments.num_windows, len(windows), batch_size):
        batch = windows.ids[start : start + batch_size].to(model.device)
        _add_batch(stack, batch, moments, held_out=start // batch_size % 2 == 1)
        on_progress(moments.num_windows)
        if save_to and start // batch_size % 16 == 15:
            moments.save(save_to)
    if save_to:
        moments.save(save_to)
    return moments


def _resume(path: Path, empty: Moments) -> Moments:
    found = Moments.load(path, empty.norm_ratio_sum.device)
    return found if found.source == empty.source else empty


def _add_batch(stack: Stack, ids_bt: Tensor, moments: Moments, *, held_out: bool) -> None:
    window = ids_bt.shape[1]
    first_window: list[Tensor] = []
    previous: list[_Rows] = []

    def visit(boundary: int, stream_btd: Tensor) -> None:
        y = _Rows.of(stream_btd)
        moments.sink_norm_ratio[boundary] += y.largest_ratio
        first_window.append(torch.nn.functional.normalize(y.rows_nd[:window], dim=-1))
        if previous:
            _add_pair(moments, boundary - 1, previous.pop(), y, held_out=held_out)
        previous.append(y)

    with stack.watch(visit):
        stack.read(ids_bt)
    _add_similarity(moments, torch.stack(first_window)[:, 1:])
    moments.num_windows += len(ids_bt)


@dataclass(frozen=True)
class _Rows:
    """A batch's stream at one boundary: rows [N, d], widened once, as a boundary is the y of one block and the x of the
    next; their norms and which are sinks [N]; the largest norm ratio of each window, summed; the dtype of the values."""

    rows_nd: Tensor
    norm_n: Tensor
    sink_n: Tensor
    largest_ratio: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, stream_btd: Tensor) -> Self:
        norm_n, ratio_bt = measure_norms(stream_btd)
        rows_nd = stream_btd.flatten(0, 1).to(torch.promote_types(stream_btd.dtype, torch.float32), copy=True)
        return cls(rows_nd, norm_n, find_sinks(ratio_bt), ratio_bt.amax(dim=1).sum(), stream_btd.dtype)


def _add_pair(moments: Moments, pair: int, x: _Rows, y: _Rows, *, held_out: bool) -> None:
    """Adds one batch around one block; the sinks' rows of x are zero afterwards."""
    apart_n = y.sink_n | x.sink_n
    sinks = moments.held_sinks if held_out else moments.sinks
    sinks.add(pair, x.rows_nd[apart_n], y.rows_nd[apart_n], held_dtype=x.dtype)
    x.rows_nd[apart_n] = 0
    _add_row_statistics(moments, pair, (x.rows_nd, x.norm_n), (y.rows_nd, y.norm_n), ~apart_n)
    ordinary = moments.held_ordinary if held_out else moments.ordinary
    ordinary.add(pair, x.rows_nd, y.rows_nd, ~apart_n, held_dtype=x.dtype)


def _add_row_statistics(
    moments: Moments, pair: int, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], keep_n: Tensor
) -> None:
    (x_nd, x_norm_n), (y_nd, y_norm_n) = x, y
    dot_n = (x_nd * y_nd).sum(1, dtype=torch.float32)
    update_n = (x_norm_n.square() + y_norm_n.square() - 2 * dot_n).clamp(min=0).sqrt()
    moments.norm_ratio_sum[pair] += (update_n / y_norm_n.clamp(min=1e-12))[keep_n].sum()
    moments.cosine_sum[pair] += (dot_n / (x_norm_n * y_norm_n).clamp(min=1e-12))[keep_n].sum()


def _add_similarity(moments: Moments, unit_ltd: Tensor) -> None:
    """Adds the cosines between boundaries for the same tokens, rows of unit norm [L+1, tokens, d]."""
    flat = unit_ltd.flatten(1)
    moments.similarity += (flat @ flat.T).to(moments.similarity)
    moments.num_compared += unit_ltd.shape[1]


def _measure_streamed(
    model: PreTrainedModel,
    windows: TokenWindows,
    batch_size: int,
    source: str,
    on_progress: Callable[[int], None],
) -> Moments:
    """The same moments with all windows going through block after block: one block, and its moments, in memory."""
    streamed, width = StreamedPass(model, windows.ids, batch_size), text_config(model).hidden_size
    depth, device, dtype = len(streamed.blocks), model.device, streamed.stream[0].dtype
    moments = _place_on_disk(Moments.zeros(depth, width, source, torch.device("meta")))
    # Boundaries of the first window of each batch, for the similarities.
    first_nltd = zeros_off_memory(len(streamed.batches), depth + 1, windows.ids.shape[1], width, dtype=dtype)
    for block in range(depth):
        own = Moments.zeros(1, width, source, device)
        for index, (x_btd, y_btd) in enumerate(streamed.run(block)):
            x, y = _Rows.of(x_btd), _Rows.of(y_btd)
            if block == 0:
                own.sink_norm_ratio[0] += x.largest_ratio
                first_nltd[index, 0] = x_btd[0]
            own.sink_norm_ratio[1] += y.largest_ratio
            first_nltd[index, block + 1] = y_btd[0]
            _add_pair(own, 0, x, y, held_out=index % 2 == 1)
        for name, gram in own.grams.items():
            for f in fields(gram):
                getattr(getattr(moments, name), f.name)[block] = getattr(gram, f.name)[0]
        moments.norm_ratio_sum[block], moments.cosine_sum[block] = own.norm_ratio_sum[0], own.cosine_sum[0]
        moments.sink_norm_ratio[block : block + 2] += own.sink_norm_ratio.to(moments.sink_norm_ratio)
        on_progress(len(windows) * (block + 1) // depth)
    for first_ltd in first_nltd:
        for rows_ltd in first_ltd[:, 1:].split(64, dim=1):
            wide = rows_ltd.to(torch.promote_types(dtype, torch.float32))
            _add_similarity(moments, torch.nn.functional.normalize(wide, dim=-1))
    moments.num_windows = len(windows)
    return moments


def _place_on_disk(empty: Moments) -> Moments:
    """Zeros on disk in the place of tensors without memory."""
    holders: list[Any] = [empty, *empty.grams.values()]
    for holder in holders:
        for f in fields(holder):
            value = getattr(holder, f.name)
            if isinstance(value, Tensor):
                setattr(holder, f.name, zeros_off_memory(*value.shape, dtype=value.dtype))
    return empty
