"""Which tokens are sinks: few, of huge norm, and most of the variance (massive activations, Sun et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

# Ordinary tokens stay within 3 times the median norm, massive activations exceed 20 (SmolLM2-135M, Llama family).
SINK_NORM_RATIO = 8.0


def measure_norms(stream_btd: Tensor) -> tuple[Tensor, Tensor]:
    """Token norms [N], and each norm over its window's median [batch, time]."""
    norm_bt = torch.linalg.vector_norm(stream_btd, dim=-1, dtype=torch.float32)
    return norm_bt.flatten(), norm_bt / norm_bt.median(dim=1, keepdim=True).values.clamp(min=1e-12)


def find_sinks(ratio_bt: Tensor) -> Tensor:
    """Which tokens are sinks [N]: the first of each window, and massive activations."""
    sink_bt = ratio_bt > SINK_NORM_RATIO
    sink_bt[:, 0] = True
    return sink_bt.flatten()
