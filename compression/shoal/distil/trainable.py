"""What of a student is trained: its maps, maps and LoRA in the kept blocks, the blocks, or all; zeros stay if so wished."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from shoal.models.modeling_shoal import LinearBlock
from shoal.models.projections import list_projections
from shoal.models.structure import find_blocks
from shoal.recipe import Distillation

NOTHING_TO_TRAIN = "there is nothing to train: trained='maps' needs kind='linear' or 'low_rank'; use trained='blocks'"


def select_trained(
    student: PreTrainedModel,
    settings: Distillation,
    *,
    keep_zeros: bool = False,
    opened: Callable[[nn.Module], AbstractContextManager] = nullcontext,
) -> None:
    """Gives the student, in place, gradients for what is trained alone, and float32 for that; LoRA goes into its blocks.

    With `keep_zeros`, weights that are zero in the projections of the blocks take no part. Inside `opened(module)`, the
    weights of a block, or of what is outside them, can be changed. Raises ValueError if nothing is left to train.
    """
    student.requires_grad_(settings.trained == "all")
    for block in find_blocks(student):
        with opened(block):
            if settings.trained == "blocks":
                block.requires_grad_(True)
            if settings.trained != "maps":
                _change_projections(block, settings, keep_zeros)
            for module in block.modules():
                if isinstance(module, LinearBlock):
                    module.requires_grad_(True)
            _keep_in_float(block)
    with opened(student):
        _keep_in_float(student)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(NOTHING_TO_TRAIN)


def _change_projections(block: nn.Module, settings: Distillation, keep_zeros: bool) -> None:
    """Adapters beside a block's projections, or inside their masks; masks alone where everything is trained."""
    projections, rank = list_projections(block), settings.lora_rank if settings.trained == "lora" else None
    if keep_zeros:
        for projection in projections.values():
            zero = projection.weight.data == 0
            masked = MaskedWeight(zero) if rank is None else MaskedLora(zero, rank)
            parametrize.register_parametrization(projection, "weight", masked, unsafe=True)
    elif rank is not None:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(projections), bias="none")
        inject_adapter_in_model(config, block)


def _keep_in_float(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def merge_trained(student: nn.Module) -> list[str]:
    """Makes plain modules of the student's, or a block's, in place: LoRA merged, masks applied.

    Returns the names of the weights that are others now.
    """
    merged = []
    for name, module in list(student.named_modules()):
        if hasattr(module, "get_base_layer"):  # one of peft's
            module.merge()
            student.set_submodule(name, module.get_base_layer())
            merged.append(f"{name}.weight")
        elif parametrize.is_parametrized(module, "weight"):
            with torch.no_grad():
                weight = torch.clone(module.weight)
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
                module.weight.data = weight
            merged.append(f"{name}.weight")
    return merged


class MaskedWeight(nn.Module):
    """A weight whose masked places are zero, and get no gradient."""

    def __init__(self, zero: Tensor):
        super().__init__()
        self.register_buffer("kept", ~zero, persistent=False)
        self.kept: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept


class MaskedLora(MaskedWeight):
    """A frozen weight plus a low-rank update B A that the mask cuts: what is trained is what a merge leaves.

    An adapter beside the weight, as in peft, would fill the zeros when it is merged (SQFT's SparsePEFT, arXiv 2410.03750).
    """

    def __init__(self, zero: Tensor, rank: int):
        super().__init__(zero)
        rows, columns = zero.shape
        self.a = nn.Parameter(torch.empty(rank, columns, device=zero.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=zero.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # peft's own start

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a) * self.kept


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Has the blocks keep their input alone for the way back, and run again there: a third slower, much less memory.

    Raises ValueError if the architecture cannot do that.
    """
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"{type(model).__name__} cannot checkpoint its gradients; leave gradient_checkpointing out")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in find_blocks(model):  # alone, not what is in it: dropout stays as it is
        block.training = True


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Products in `dtype` whatever the parameters are kept in; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
