"""What of a student is trained: its maps, its maps with LoRA in the kept blocks, or everything."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import PreTrainedModel

from shoal.blocks import find_projections
from shoal.recipe import Distillation
from shoal.replace import linear_blocks


def select_trained(student: PreTrainedModel, settings: Distillation) -> PreTrainedModel:
    """The student with gradients, in float32, for what is trained alone; wrapped by peft where that is LoRA.

    Raises ValueError if nothing is left to train.
    """
    maps = linear_blocks(student)
    student.requires_grad_(settings.trained == "all")
    if settings.trained == "lora":
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


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Products in `dtype` whatever the parameters are kept in; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
