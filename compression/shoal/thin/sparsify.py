"""Wanda: the weights of least |W| · ‖X‖₂ become zero, row by row, without training (arXiv 2306.11695).

‖X‖₂ is the norm of each input feature over the calibration tokens. Blocks are pruned in order, on the stream that the
pruned blocks before them leave. Pruned are the projections of the decoder blocks; embeddings, head, norms, biases and
the maps in place of replaced blocks are not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal.models.projections import find_projections
from shoal.recipe import Sparsity
from shoal.text.windows import TokenWindows
from shoal.thin.projections import walk_projections


@torch.no_grad()
def sparsify(
    model: PreTrainedModel,
    windows: TokenWindows,
    sparsity: Sparsity,
    *,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> None:
    """Zeros in place: `sparsity` is the share of each row that becomes zero, or how many of each group stay ("2:4").

    Raises ValueError if the groups do not fill the rows of some projection. `on_progress` hears the blocks done.
    """
    projections = find_projections(model)
    require_whole_groups(model, sparsity)
    for done, squares in enumerate(walk_projections(model, windows, lambda x_ti: x_ti.float().square().sum(0)), start=1):
        for name, squares_i in squares.items():
            module = projections[name]
            weight = module.weight.data
            weight_oi = weight.T if isinstance(module, Conv1D) else weight
            keep_oi = choose_kept(weight_oi.float().abs() * squares_i.sqrt().float(), sparsity)
            weight_oi.mul_(keep_oi)
        on_progress(done)


def choose_kept(importance_oi: Tensor, sparsity: Sparsity) -> Tensor:
    """Which weights stay [O, I]: the most important of each row, or of each group of neighbours in a row.

    Of a share, exactly round(share · I) of every row go; of "2:4", exactly 2 of every 4. Of equals the later stay.
    """
    rows, width = importance_oi.shape
    if isinstance(sparsity, str):
        num_kept, group = map(int, sparsity.split(":"))
        num_pruned = group - num_kept
    else:
        num_pruned, group = round(sparsity * width), width
    grouped = importance_oi.reshape(rows, width // group, group)
    pruned = grouped.argsort(dim=-1, stable=True)[..., :num_pruned]
    return torch.ones_like(grouped, dtype=torch.bool).scatter_(-1, pruned, False).view(rows, width)


def require_whole_groups(model: PreTrainedModel, sparsity: Sparsity) -> None:
    """Raises ValueError if some projection's rows are no multiple of the group in "2:4" or "4:8"."""
    if not isinstance(sparsity, str):
        return
    group = int(sparsity.split(":")[1])
    for name, module in find_projections(model).items():
        width = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
        if width % group:
            raise ValueError(
                f"sparsity={sparsity!r}: {name} has {width} inputs, no multiple of {group}; give a share such as 0.5"
            )
