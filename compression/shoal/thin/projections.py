"""What enters every projection, block by block: sums over calibration tokens, each block after the changed ones before it.

T tokens, I inputs and O outputs of a projection; weights are [O, I] however the module stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal.models.calls import embed, record_calls
from shoal.models.projections import find_projections
from shoal.models.structure import find_blocks
from shoal.replace.in_order import split_evenly
from shoal.text.windows import TokenWindows


def walk_projections(
    model: PreTrainedModel, windows: TokenWindows, sum_rows: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """For each block in order, the sums of `sum_rows(inputs [T, I])` over all tokens in float64, by projection name.

    Change the block's weights or modules before asking for the next: its inputs come from the blocks as they are then.
    Raises ValueError for experts that are not linear layers.
    """
    projections = find_projections(model)
    require_plain_projections(model)
    blocks = find_blocks(model)
    batches = split_evenly(windows, model.device)
    with torch.no_grad():
        calls = record_calls(model, batches[0])
        stream = [embed(model, ids) for ids in batches]
    for block, call in zip(blocks, calls, strict=True):
        inside = {id(module) for module in block.modules()}
        own = {name: module for name, module in projections.items() if id(module) in inside}
        sums: dict[str, Tensor] = {}
        with torch.no_grad():
            for batch in stream:
                with watch_inputs(own) as inputs:
                    call.run(block, batch)
                for name, part in _sum_inputs(inputs, sum_rows).items():
                    sums[name] = sums[name] + part if name in sums else part
        yield sums
        with torch.no_grad():
            stream = [call.run(block, batch) for batch in stream]


@contextmanager
def watch_inputs(projections: dict[str, nn.Linear | Conv1D]) -> Iterator[dict[str, Tensor]]:
    """Inside, the last input [..., I] of each projection is kept in the dict that this gives."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _module, args, name=name: inputs.__setitem__(name, args[0]))
        for name, module in projections.items()
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _sum_inputs(inputs: dict[str, Tensor], sum_rows: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The sums of one batch; projections that read one tensor (query, key and value) share theirs."""
    by_tensor = {id(x): x for x in inputs.values()}
    sums = {key: sum_rows(x.reshape(-1, x.shape[-1])).double() for key, x in by_tensor.items()}
    return {name: sums[id(x)] for name, x in inputs.items()}


def require_plain_projections(model: PreTrainedModel) -> None:
    """Raises ValueError where most of a block is in tensors that are no linear layer's, as in mixtures of experts."""
    held = sum(module.weight.numel() for module in find_projections(model).values())
    total = sum(p.numel() for p in find_blocks(model).parameters() if p.dim() > 1)
    if 2 * held < total:
        raise ValueError(
            f"the linear layers of {type(model).__name__} hold {held / total:.0%} of its blocks' weights (a mixture of "
            "experts?); sparsity and weight_share need blocks of plain linear layers"
        )
