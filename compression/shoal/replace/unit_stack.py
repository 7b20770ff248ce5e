"""A stack of blocks that can be run from any place to any other, also from the attention of a block to its MLP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.large.on_disk import in_memory
from shoal.models.calls import Call, embed, record_calls
from shoal.models.modeling_shoal import Absent
from shoal.models.projections import has_matrix
from shoal.models.structure import find_blocks

Stream = list[Tensor]
"""Batches [batch, time, d] of the residual stream."""
NUM_SAMPLED = 64


@dataclass(frozen=True)
class Part:
    """The attention or the MLP of a block: its name in the block, and of how many values the tuple is that it returns.

    `num_outputs` is None where it returns a tensor.
    """

    name: str
    num_outputs: int | None


Parts = tuple[Part, Part]


@contextmanager
def without(block: nn.Module, part: Part) -> Iterator[None]:
    """Inside, the block adds nothing to the stream where this part of it did."""
    module = block.get_submodule(part.name)
    block.set_submodule(part.name, Absent(part.num_outputs))
    try:
        yield
    finally:
        block.set_submodule(part.name, module)


class UnitStack:
    """Blocks, how each is called, and the attention and MLP of those that have them one after the other."""

    def __init__(self, blocks: Iterable[nn.Module], calls: list[Call], parts: Sequence[Parts | None]):
        self.blocks, self.calls, self.parts = list(blocks), calls, parts

    def run(self, start: int, stop: int, stream: Stream) -> Stream:
        """The stream at place `stop`, from that at place `start`."""
        place = start
        while place < stop:
            after = min(stop, place + 2 - place % 2)
            with self.unit(place, after) as block:
                stream = [self.calls[place // 2].run(block, batch) for batch in stream]
            place = after
        return stream

    @contextmanager
    def unit(self, start: int, stop: int) -> Iterator[nn.Module]:
        """Inside, the block that the places from `start` to `stop` lie in, in memory, without its other part."""
        block, parts = self.blocks[start // 2], self.parts[start // 2]
        with in_memory(block):
            if stop - start == 2:
                yield block
                return
            if parts is None:
                raise ValueError(explain_parts(start // 2))
            with without(block, parts[1 - start % 2]):
                yield block


def explain_parts(block: int) -> str:
    """Why a part of the block cannot leave."""
    return f"block {block} has no attention and MLP that stand one after the other: name the whole block"


@torch.no_grad()
def find_parts(model: PreTrainedModel, ids: Tensor) -> list[Parts | None]:
    """The attention and the MLP of each block, found on a few of the tokens ids [batch, time]; None where it has no such.

    Found by trying: of the block's modules with matrices there are two, and the block without the second, then without the
    first, is the block. In blocks whose parts stand side by side (GPT-NeoX, Falcon) they are not apart.
    """
    sample = ids[:1, :NUM_SAMPLED]
    stream, found = embed(model, sample), list[Parts | None]()
    for block, call in zip(find_blocks(model), record_calls(model, sample), strict=True):
        with in_memory(block):
            parts, stream = _take_apart(block, call, stream)
        found.append(parts)
    return found


def _take_apart(block: nn.Module, call: Call, stream: Tensor) -> tuple[Parts | None, Tensor]:
    """The block's parts, and the stream after it."""
    found: list[Part] = []

    def note(name: str):
        return lambda _m, _args, output: found.append(Part(name, len(output) if isinstance(output, tuple) else None))

    hooks = [child.register_forward_hook(note(name)) for name, child in block.named_children() if has_matrix(child)]
    try:
        whole = call.run(block, stream)
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) != 2 or found[0].name == found[1].name:
        return None, whole
    attention, mlp = found
    with without(block, mlp):
        middle = call.run(block, stream)
    with without(block, attention):
        end = call.run(block, middle)
    error = (end.float() - whole.float()).norm() / whole.float().norm()
    is_apart = float(error) < (1e-4 if stream.dtype == torch.float32 else 2e-2)
    return ((attention, mlp) if is_apart else None), whole
