"""How much a pass may hold at once, and how this process's allocator treats the memory that it frees."""

from __future__ import annotations

import ctypes
import functools
import platform

import psutil
import torch

# Values of logits held at once: 2^28 in float32 are 1 GiB.
MAX_LOGITS = 2**28
# The streams of all windows that go through blocks on disk together: more of them read a model fewer times.
MAX_STREAM_BYTES = 2**31

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_BUFFER_BYTES, KEPT_BYTES, SMALLEST_BUFFER_BYTES = 2**30, 2**31 - 1, 2**18


def find_free_bytes(device: torch.device) -> int:
    """The memory that is free now: the machine's for its CPU, the accelerator's own for that."""
    return psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def keep_freed_memory() -> None:
    """Has glibc keep freed buffers for the next layer instead of giving them back to the kernel at once.

    With glibc's own thresholds every large activation is mapped, zeroed page by page and unmapped again: of a bfloat16
    forward pass on a CPU that is 15 % of the time, of a pass that measures moments 25 % (SmolLM2-135M, 4 windows of
    1024 tokens). Other allocators and systems are left as they are.
    """
    if libc := _find_glibc():
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BUFFER_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back_freed_memory() -> None:
    """Has glibc give every large freed buffer back to the kernel at once, for models that memory is short for.

    glibc's own threshold grows with what is freed, up to 32 MiB, and below it the holes between buffers add up: two ranks
    that share SmolLM2-135M's weights took up to 2.7 GiB each while they trained, and take 1.3 GiB so (float32).
    """
    if libc := _find_glibc():
        libc.mallopt(M_MMAP_THRESHOLD, SMALLEST_BUFFER_BYTES)


@functools.cache
def _find_glibc() -> ctypes.CDLL | None:
    """The C library of this process, None if it is another one."""
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    return libc if libc is not None and hasattr(libc, "mallopt") else None
