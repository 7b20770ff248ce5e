"""What of a student is trained: its maps, its maps with LoRA in the kept blocks, or everything; zeros stay if so wished."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from shoal.blocks import find_projections, find_zeros
from shoal.recipe import Distillation
from shoal.replace import linear_blocks


def select_trained(student: PreTrainedModel, settings: Distillation, *, keep_zeros: bool = False) -> PreTrainedModel:
    """The student with gradients, in float32, for what is trained alone; wrapped by peft where that is LoRA.

    With `keep_zeros`, weights that are zero in the projections of the blocks take no part. Raises ValueError if nothing is
    left to train.
    """
    maps = linear_blocks(student)
    student.requires_grad_(settings.trained == "all")
    if keep_zeros and settings.trained != "maps":
        _mask_weights(student, settings.lora_rank if settings.trained == "lora" else None)
    elif settings.trained == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_rank, target_modules=list(find_projections(student)), bias="none"
        )
        student = get_peft_model(student, config)  # type: ignore[assignment]
    for linear in maps:
        linear.requires_grad_(True)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("there is nothing to train: trained='maps' needs kind='linear' or 'low_rank'; use trained='lora'")
    for parameter in trained:
        parameter.data = parameter.data.float()
    return student


def merge_trained(student: PreTrainedModel) -> PreTrainedModel:
    """The student as a plain model again: LoRA merged, masks applied."""
    merge = getattr(student, "merge_and_unload", None)
    merged: PreTrainedModel = merge() if merge else student
    for module in list(merged.modules()):
        if parametrize.is_parametrized(module, "weight"):
            with torch.no_grad():
                weight = torch.clone(module.weight)  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
                module.weight.data = weight
    return merged


def _mask_weights(student: PreTrainedModel, lora_rank: int | None) -> None:
    zeros = find_zeros(student)
    for name, projection in find_projections(student).items():
        masked = MaskedWeight(zeros[name]) if lora_rank is None else MaskedLora(zeros[name], lora_rank)
        parametrize.register_parametrization(projection, "weight", masked, unsafe=True)


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


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Products in `dtype` whatever the parameters are kept in; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
