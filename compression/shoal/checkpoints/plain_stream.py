"""Whether blocks hand on one residual stream and know nothing else of the tokens: what Shoal takes for granted of them.

Found by trying: while the model reads a second text, each block is run with the stream that it had in the first, and with
all else that the model gives it for the second. Where something else comes out, or the next block is given something
else, moments, fits and streamed passes would be of another function, in silence: the model is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from shoal.models.structure import find_stacks, first_tensor, stream_input

# Inputs of every block from the token ids (Gemma 3n, Gemma 4 E), and blocks that reuse an earlier one's keys and values.
SIDE_CHANNELS = ("hidden_size_per_layer_input", "num_kv_shared_layers")


def refuse_side_channels(config: PretrainedConfig) -> None:
    """Raises ValueError where the configuration alone tells that a stream is not all that a block is given."""
    text = config.get_text_config(decoder=True)
    for name in SIDE_CHANNELS:
        if value := getattr(text, name, None):
            raise _not_plain(config, f"its blocks are given more than the stream ({name}={value})")


@dataclass
class _Seen:
    """How a block was called in the first text, and the stream that it returned."""

    args: tuple
    kwargs: dict
    output: Tensor | None = None


@torch.no_grad()
def require_plain_stream(model: PreTrainedModel, ids: Tensor, read: Callable[[Tensor], Any]) -> Any:
    """What `read(ids)` returns, a forward pass of ids [batch, time]; it is called twice.

    Raises ValueError unless each block of the model's first stack maps a stream [batch, time, d] to the next block's.
    """
    config, blocks = model.config, find_stacks(model)[0].blocks
    seen: list[_Seen] = []
    again = iter(seen)

    def note_call(_block: nn.Module, args: tuple, kwargs: dict) -> None:
        stream = stream_input(args, kwargs)
        if stream.dim() != 3 or stream.shape[:2] != ids.shape:
            raise _not_plain(config, f"{list(ids.shape)} tokens make a stream of shape {list(stream.shape)}")
        if seen and (seen[-1].output is None or not torch.equal(stream, seen[-1].output)):
            raise _not_plain(config, f"block {len(seen)} is not given what block {len(seen) - 1} returns")
        seen.append(_Seen(args, kwargs))

    def note_output(_block: nn.Module, _args: tuple, output: Any) -> None:
        seen[-1].output = first_tensor(output)
        if not isinstance(seen[-1].output, Tensor):
            raise _not_plain(config, f"a block returns a {type(output).__name__}")

    def run_again(block: nn.Module, args: tuple, kwargs: dict) -> None:
        first = next(again)
        if differing := _find_differing(block, first, args, kwargs):
            raise _not_plain(config, f"its blocks are also given {differing}, which depends on the tokens")
        given = {"hidden_states": first.kwargs["hidden_states"]} if not args else {}
        # Straight to `forward`: the hooks of this call have been at work already.
        output = first_tensor(block.forward(*first.args[:1], *args[1:], **kwargs | given))
        assert first.output is not None
        tolerance = float(output.abs().max()) * max(2 * torch.finfo(output.dtype).eps, 1e-5)
        if not torch.allclose(output, first.output, rtol=0, atol=tolerance, equal_nan=True):
            raise _not_plain(config, "its blocks know of the tokens by other ways than the stream")

    with _hooks(blocks, note_call, note_output):
        result = read(ids)
    if len(seen) != len(blocks):
        raise _not_plain(config, f"{len(blocks)} blocks run {len(seen)} times")
    with _hooks(blocks, run_again):
        read(ids.flip(0, 1))
    return result


@contextmanager
def _hooks(blocks: nn.ModuleList, before: Callable, after: Callable | None = None) -> Iterator[None]:
    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(after, prepend=True) for block in blocks if after is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _find_differing(block: nn.Module, first: _Seen, args: tuple, kwargs: dict) -> str | None:
    """The argument beside the stream that was another in the first text."""
    names = list(inspect.signature(block.forward).parameters)
    pairs = dict(zip(names[1:], zip(first.args[1:], args[1:], strict=True), strict=False))
    pairs |= {name: (first.kwargs.get(name), value) for name, value in kwargs.items() if name != "hidden_states"}
    return next((name for name, (one, other) in pairs.items() if not _are_same(one, other)), None)


def _are_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_are_same, one, other))
    return True  # what else there is shows in what the block returns


def _not_plain(config: PretrainedConfig, what: str) -> ValueError:
    return ValueError(
        f"{config.model_type} has no plain residual stream: {what}; Shoal replaces blocks by maps of the stream alone"
    )
