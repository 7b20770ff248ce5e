"""Windows through a model block after block, so that a block has to be in memory only once for all of them.

B batch, T time, V vocabulary, d hidden size. Where the blocks are in memory, whole forward passes need less of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.large.memory import MAX_STREAM_BYTES
from shoal.large.on_disk import in_memory, is_on_disk
from shoal.models.calls import embed, find_logits, record_calls
from shoal.models.structure import find_blocks, text_config
from shoal.text.windows import TokenWindows

WINDOWS_PER_BATCH = 8


class StreamedPass:
    """The residual streams of all windows, at the boundary that they have reached. One block is run at a time.

    `batches` are the token ids and `stream` the streams [batch, time, d] at that boundary.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, ids: Tensor, batch_size: int = WINDOWS_PER_BATCH):
        self.blocks = find_blocks(model)
        self.batches = [batch.to(model.device) for batch in ids.split(batch_size)]
        # Masks have the shape of their batch; all are equal but for the last.
        self.calls = {len(batch): record_calls(model, batch) for batch in (self.batches[0], self.batches[-1])}
        self.stream = [embed(model, batch) for batch in self.batches]

    def run(self, block: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Each batch's stream before and after the block, which is in memory meanwhile; to be run to the end."""
        with in_memory(self.blocks[block]):
            for index, before in enumerate(self.stream):
                self.stream[index] = self.calls[len(before)][block].run(self.blocks[block], before)
                yield before, self.stream[index]


@torch.no_grad()
def read_logits(
    model: PreTrainedModel, windows: TokenWindows, batch_size: int, on_progress: Callable[[int], None]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For all windows, some at a time: which they are, their ids [B, T] and logits [B, T, V].

    `on_progress` hears how many of the windows are done.
    """
    if is_on_disk(model):
        yield from _read_streamed(model, windows, on_progress)
        return
    for start in range(0, len(windows), batch_size):
        rows = slice(start, start + batch_size)
        ids = windows.ids[rows].to(model.device)
        yield rows, ids, model(input_ids=ids, use_cache=False).logits
        on_progress(min(start + batch_size, len(windows)))


def _read_streamed(
    model: PreTrainedModel, windows: TokenWindows, on_progress: Callable[[int], None]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    bytes_per_window = windows.ids.shape[1] * text_config(model).hidden_size * model.dtype.itemsize
    start = 0
    for ids in windows.ids.split(max(1, MAX_STREAM_BYTES // bytes_per_window)):
        streamed = StreamedPass(model, ids)
        for block in range(len(streamed.blocks)):
            for _ in streamed.run(block):
                pass
            on_progress(start + len(ids) * block // len(streamed.blocks))
        for batch, stream in zip(streamed.batches, streamed.stream, strict=True):
            for row in range(len(batch)):  # one at a time: logits are large
                one = slice(row, row + 1)
                yield (
                    slice(start, start + 1),
                    batch[one],
                    find_logits(model, batch[one], stream[one], streamed.calls[len(batch)]),
                )
                start += 1
        on_progress(start)
