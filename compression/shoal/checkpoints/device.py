"""Where a model is computed, and in which numbers."""

from __future__ import annotations

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device() -> torch.device:
    """The accelerator that torch sees, else the CPU; the CPU too where the accelerator has no float64 (Apple's)."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None or accelerator.type == "mps" else accelerator


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, float32 elsewhere.

    On a CPU with AMX, bfloat16 evaluates ten times faster than float32; without AMX or AVX512-BF16 it is slower.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        flags = torch.backends.cpu.get_cpu_capability()
        native = flags.startswith("AMX") or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16


def read_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name; None: what suits the device. Raises ValueError for another name."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype] if dtype else choose_dtype(device)
