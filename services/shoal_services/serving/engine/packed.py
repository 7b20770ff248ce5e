"""Linear layers whose weights are packed once for the CPU.

PyTorch packs the weights of a bfloat16 product anew at every call, which for a single token costs more than the
product: packed once, a decode step of SmolLM2-135M reads its weights in 17 ms instead of 25 (2 cores with AMX). In
float32, oneDNN's layout makes products of 8 rows 1.2 to 2.1 times faster than the plain one (2 cores with AVX2).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class PackedLinear(nn.Module):
    """A linear layer over packed weights, computed for at least `min_rows` rows."""

    def __init__(self, layer: nn.Linear | Conv1D):
        super().__init__()
        weight = layer.weight.detach()
        weight_oi = (weight.T if isinstance(layer, Conv1D) else weight).contiguous()
        self.out_features, self.in_features = weight_oi.shape
        self.dtype = weight_oi.dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_oi, None)
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.multiply = torch.ops.mkldnn._linear_pointwise.default
        self.pad_to(1)

    def pad_to(self, min_rows: int) -> None:
        """From now on no product has fewer rows than `min_rows`."""
        self.min_rows = min_rows
        self.padded = torch.zeros((min_rows, self.in_features), dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        num_rows = len(rows)
        if num_rows < self.min_rows:
            self.padded[:num_rows] = rows  # what is left of other calls below them is of no account
            rows = self.padded
        out = self.multiply(rows, self.packed, self.bias, "none", [], "")
        return out[:num_rows].view(*x.shape[:-1], self.out_features)


def pack_linears(model: nn.Module, *, max_rows: int) -> int:
    """Swaps the linear layers of a model on a CPU for packed ones; returns how many (0 on other hardware, and of bfloat16
    where the processor's instructions do not suffice for oneDNN).

    A token's output is then the same, bit by bit, whatever the rows beside it, up to `max_rows` of them. The model can
    no longer be saved or trained.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return 0
    dtypes = {torch.float32} | ({torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())
    found: list[tuple[nn.Module, str, PackedLinear]] = []
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) in (nn.Linear, Conv1D):
                layer = cast(nn.Linear | Conv1D, child)
                if layer.weight.device.type == "cpu" and layer.weight.dtype in dtypes:
                    found.append((parent, name, PackedLinear(layer)))
    min_rows: dict[tuple[int, int], int] = {}
    for parent, name, packed in found:
        shape = packed.out_features, packed.in_features
        if shape not in min_rows:
            min_rows[shape] = find_stable_rows(packed, max_rows)
        packed.pad_to(min_rows[shape])
        setattr(parent, name, packed)
    return len(found)


def find_stable_rows(layer: PackedLinear, max_rows: int) -> int:
    """The fewest rows from which on a row's product is the same, bit by bit, up to `max_rows` rows.

    oneDNN may choose another order of summation for another number of rows: with AMX it does for a few rows, with
    AVX-512 alone for none. With AMX, up to 16 rows cost what one costs, without it each row costs.
    """
    rows = torch.randn((max_rows, layer.in_features), generator=torch.Generator().manual_seed(0)).to(layer.dtype)
    whole = layer(rows)
    fewest = max_rows
    while fewest > 1 and torch.equal(layer(rows[: fewest - 1]), whole[: fewest - 1]):
        fewest -= 1
    return fewest
