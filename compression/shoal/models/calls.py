"""A model taken apart: what comes before the blocks, how each of them is called, and what comes after.

So windows can go through block after block, instead of through the whole model one batch after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from shoal.models.structure import find_blocks, find_stacks, first_tensor, stream_input


@dataclass(frozen=True)
class Call:
    """How the model calls one block, but for the residual stream: masks, positions, rotary embeddings.

    `tail` is what the block returns behind the stream, None if it returns the stream alone.
    """

    args: tuple
    kwargs: dict
    tail: tuple | None = None

    def run(self, block: nn.Module, stream: Tensor) -> Tensor:
        """The stream [batch, time, d] after the block."""
        return first_tensor(block(stream, *self.args, **self.kwargs))


@torch.no_grad()
def record_calls(model: PreTrainedModel, ids: Tensor) -> list[Call]:
    """How each block is called for windows of the shape of ids [batch, time]; of the blocks, the first alone is run."""
    calls: list[Call] = []

    def note(call: Call, stream: Tensor) -> Tensor:
        calls.append(call)
        return stream

    stack = find_stacks(model)[0]
    with _stand_in(model, _find_tail(model, ids), note):
        stack.read(ids)
    return calls


@torch.no_grad()
def find_logits(model: PreTrainedModel, ids: Tensor, stream: Tensor, calls: list[Call]) -> Tensor:
    """The logits [batch, time, V] for ids [batch, time] whose stream after the last block is known."""
    with _stand_in(model, calls[0].tail, lambda _call, _stream: stream):
        return model(input_ids=ids, use_cache=False).logits


def _find_tail(model: PreTrainedModel, ids: Tensor) -> tuple | None:
    """What the blocks return behind the stream; None if they return the stream alone."""
    found: list[Tensor | tuple] = []

    def stop(_block, _args, output):
        found.append(output)
        raise _Stop

    _run_until_stopped(model, ids, find_blocks(model)[0].register_forward_hook(stop))
    return found[0][1:] if isinstance(found[0], tuple) else None


@contextmanager
def _stand_in(model: PreTrainedModel, tail: tuple | None, answer: Callable[[Call, Tensor], Tensor]) -> Iterator[None]:
    """Inside, no block runs: `answer(call, stream)` gives the stream that it returns."""
    decoder = find_blocks(model)
    blocks = list(decoder)
    for index, block in enumerate(blocks):
        decoder[index] = _StandIn(block, tail, answer)
    try:
        yield
    finally:
        for index, block in enumerate(blocks):
            decoder[index] = block


class _StandIn(nn.Module):
    """Answers in the place of a block, in the form in which the block does; has the block's attributes."""

    def __init__(self, block: nn.Module, tail: tuple | None, answer: Callable[[Call, Tensor], Tensor]):
        super().__init__()
        self.__dict__.update(block=block, tail=tail, answer=answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args, **kwargs):
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        stream = self.answer(Call(args[1:], rest, self.tail), stream_input(args, kwargs))
        return stream if self.tail is None else (stream, *self.tail)


@torch.no_grad()
def embed(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The stream before block 0 [batch, time, d] for ids [batch, time], without running the blocks."""
    stopped: list[Tensor] = []

    def stop(_block, args, kwargs):
        stopped.append(stream_input(args, kwargs))
        raise _Stop

    hook = find_blocks(model)[0].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    _run_until_stopped(model, ids, hook)
    return stopped[0]


def _run_until_stopped(model: PreTrainedModel, ids: Tensor, hook: RemovableHandle) -> None:
    """A forward pass that `hook` ends by raising `_Stop`; the hook is gone afterwards."""
    try:
        find_stacks(model)[0].read(ids)
    except _Stop:
        pass
    finally:
        hook.remove()


class _Stop(Exception):
    """Ends a forward pass at the first block."""
