"""The blocks of any Hugging Face transformer, found by structure.

A block maps the residual stream [batch, time, d] to itself. Boundary l is the stream before block l; boundary
num_hidden_layers is the stream after the last block, before the final norm. A causal language model is one stack of
blocks, an encoder (BERT) another; an encoder-decoder (T5, BART) has both. What Shoal replaces are the blocks of the first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PretrainedConfig, PreTrainedModel

from shoal.models.modeling_shoal import OWN_MODULES, list_blocks, list_first_blocks, text_config


@dataclass(frozen=True)
class Stack:
    """Blocks that one residual stream goes through: "encoder" or "decoder", and the model that feeds them."""

    name: str
    blocks: nn.ModuleList
    model: PreTrainedModel

    def read(self, ids: Tensor) -> None:
        """One forward pass of token ids [batch, time] through the blocks.

        To the decoder of an encoder-decoder the text is source and, shifted by one, target: it is to say what it read.
        """
        if not self.model.config.is_encoder_decoder:
            self.model.base_model(input_ids=ids, use_cache=False)
        elif self.name == "encoder":
            self.model.get_encoder()(input_ids=ids)
        else:
            self.model(input_ids=ids, labels=ids, use_cache=False)

    @contextmanager
    def watch(self, visit: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Inside, every forward pass calls visit(l, stream [batch, time, d]) at each boundary l = 0 … depth, in order.

        Hooks, and not `output_hidden_states`, because the last of those is after the final norm.
        """

        def before(_block, args, kwargs):
            visit(0, stream_input(args, kwargs))

        def after(boundary: int):
            return lambda _block, _args, output: visit(boundary, first_tensor(output))

        hooks = [self.blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [block.register_forward_hook(after(index + 1)) for index, block in enumerate(self.blocks)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def find_stacks(model: PreTrainedModel) -> list[Stack]:
    """The model's stacks: one, or an encoder-decoder's two.

    Raises ValueError if there is no list of blocks (no transformer stack, or blocks that share their weights).
    """
    if model.config.is_encoder_decoder:
        lists = {"encoder": list_first_blocks(model), "decoder": list_blocks(model.get_decoder(), None)}
    else:
        lists = {"encoder" if is_encoder(model.config) else "decoder": list_first_blocks(model)}
    return [Stack(name, _require_blocks(blocks, name, model), model) for name, blocks in lists.items()]


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of the model's first stack, in order. Raises ValueError if it has none."""
    return find_stacks(model)[0].blocks


def _require_blocks(blocks: nn.ModuleList | None, name: str, model: PreTrainedModel) -> nn.ModuleList:
    if blocks is None:
        depth = "" if model.config.is_encoder_decoder else f"{text_config(model).num_hidden_layers} "
        raise ValueError(
            f"{type(model).__name__} has no list of {depth}{name} blocks, so there is nothing to measure or replace; "
            "Shoal needs a transformer with a plain stack of blocks that do not share their weights"
        )
    return blocks


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether this is an encoder alone: a masked language model whose tokens see those after them."""
    masked = any(kind in MODEL_FOR_MASKED_LM_MAPPING for kind in type(config).__mro__)
    return masked and not config.is_encoder_decoder and not getattr(config, "is_decoder", False)


def is_causal(config: PretrainedConfig) -> bool:
    """Whether this is a decoder alone: a causal language model."""
    return not is_encoder(config) and not config.is_encoder_decoder


def holds_own_modules(model: PreTrainedModel) -> bool:
    """Whether the model holds linear blocks or factored projections, which no stock architecture has."""
    return any(getattr(text_config(model), name, None) for name in OWN_MODULES)


def name_cache_argument(model: PreTrainedModel) -> str:
    """What the model's `forward` calls its KV cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def check_block_indices(indices: Iterable[int], depth: int) -> None:
    """Raises ValueError unless all indices are blocks of a model of that depth, and one block stays."""
    indices = set(indices)
    outside = sorted(index for index in indices if not 0 <= index < depth)
    if outside:
        raise ValueError(f"blocks {outside} do not exist: the model has blocks 0 to {depth - 1}")
    if len(indices) >= depth:
        raise ValueError(
            f"cannot replace {len(indices)} of {depth} blocks: at least one must stay; choose {depth - 1} or fewer"
        )


def first_tensor(output: Tensor | tuple) -> Tensor:
    """The residual stream in what a block returns: some families return a tuple."""
    return output[0] if isinstance(output, tuple) else output


def stream_input(args: tuple, kwargs: dict) -> Tensor:
    """The residual stream in what a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


def watch_boundaries(model: PreTrainedModel, visit: Callable[[int, Tensor], None]) -> AbstractContextManager[None]:
    """Inside, every forward pass visits the boundaries of the model's first stack (see `Stack.watch`)."""
    return find_stacks(model)[0].watch(visit)
