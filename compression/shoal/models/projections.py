"""The projections inside the blocks, `Linear` and GPT-2's `Conv1D` alike: which, how wide, where they are zero."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal.models.structure import find_blocks


def find_down_proj(block: nn.Module, hidden_size: int) -> nn.Linear | Conv1D | None:
    """The MLP's last projection: the one to `hidden_size` from another width outside the attention; None if not one.

    Whether its output is what the block adds to the stream, `shoal.replace.refit.find_gain` finds out. Several of them
    (mixture of experts) leave no single matrix into which a map could be folded.
    """
    candidates = [
        module
        for name, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and "att" not in name
        and width_out(module) == hidden_size != width_in(module)
    ]
    return candidates[0] if len(candidates) == 1 else None


def find_projections(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Every projection inside the blocks, by its name in the model; the linear maps between blocks are none."""
    blocks = find_blocks(model)
    path = next(path for path, module in model.named_modules() if module is blocks)
    return {
        f"{path}.{index}.{name}": projection
        for index, block in enumerate(blocks)
        for name, projection in list_projections(block).items()
    }


def list_projections(block: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """A block's projections by their names in it."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not name.startswith("linear_")
    }


def find_zeros(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is zero in each projection of the blocks, by its name; as the module stores the weight."""
    return {name: module.weight.data == 0 for name, module in find_projections(model).items()}


def width_in(projection: nn.Linear | Conv1D) -> int:
    return projection.weight.shape[0] if isinstance(projection, Conv1D) else projection.weight.shape[1]


def width_out(projection: nn.Linear | Conv1D) -> int:
    return projection.weight.shape[1] if isinstance(projection, Conv1D) else projection.weight.shape[0]


def weight_of(projection: nn.Linear | Conv1D) -> Tensor:
    """The weight as [out, in], however the module stores it."""
    return projection.weight.T if isinstance(projection, Conv1D) else projection.weight


def has_matrix(module: nn.Module) -> bool:
    """Whether the module has weights of two dimensions or more: a norm has not."""
    return any(weight.dim() > 1 for weight in module.parameters())
