"""Sums over tokens from which every least-squares map follows: they add, so they shard, merge and resume."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


def multiply_rows(x_nd: Tensor, *others_ne: Tensor, held_dtype: torch.dtype | None = None) -> list[Tensor]:
    """xᵀy [d, e] for each of the others, in float32 (in float64 for float64 rows).

    `held_dtype` is the dtype whose values the rows hold, if they were widened. Products of bfloat16 rows are exact in
    float32, so accumulating them there loses nothing: on hardware that multiplies bfloat16 natively this is four
    times faster than a float32 product (AMX).
    """
    if (held_dtype or x_nd.dtype) != torch.bfloat16:
        return [_widen(x_nd).T @ _widen(y_ne) for y_ne in others_ne]
    if x_nd.is_cuda:
        narrow = x_nd.bfloat16().T
        return [torch.mm(narrow, y_ne.bfloat16(), out_dtype=torch.float32) for y_ne in others_ne]
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        x_float = x_nd.float()
        return [x_float.T @ (x_float if y_ne is x_nd else y_ne.float()) for y_ne in others_ne]
    finally:
        matmul.fp32_precision = before


def _widen(rows: Tensor) -> Tensor:
    """Rows in float32 or float64: sums of squares overflow float16."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


@dataclass
class Gram:
    """Sums over tokens of pairs (x, y) of rows, for L pairs: enough for every least-squares map from x to y.

    num_tokens [L], sum_x [L, d], sum_y [L, e], xx [L, d, d] = Σ x xᵀ, xy [L, d, e] = Σ x yᵀ, yy [L] = Σ ‖y‖²;
    all float64.
    """

    num_tokens: Tensor
    sum_x: Tensor
    sum_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, num_pairs: int, width_x: int, width_y: int, device: torch.device | None = None) -> Self:
        shapes = [(), (width_x,), (width_y,), (width_x, width_x), (width_x, width_y), ()]
        return cls(*(torch.zeros((num_pairs, *shape), dtype=torch.float64, device=device) for shape in shapes))

    def add(
        self,
        pair: int,
        x_nd: Tensor,
        y_ne: Tensor,
        keep_n: Tensor | None = None,
        *,
        held_dtype: torch.dtype | None = None,
    ) -> None:
        """Adds rows in place; with `keep_n` [N] bool, rows of x outside it must be zero already.

        `held_dtype` is the dtype whose values the rows hold, if they were widened already (see `multiply_rows`).
        """
        held_dtype = held_dtype or x_nd.dtype
        x, y = _widen(x_nd), _widen(y_ne)
        weight_n = torch.ones(len(x), device=x.device, dtype=y.dtype) if keep_n is None else keep_n.to(y.dtype)
        self.num_tokens[pair] += weight_n.sum()
        self.sum_x[pair] += x.sum(0)
        self.sum_y[pair] += weight_n @ y
        self.yy[pair] += weight_n @ torch.linalg.vector_norm(y, dim=1).square()
        xx, xy = multiply_rows(x, x, y, held_dtype=held_dtype)
        self.xx[pair] += xx
        self.xy[pair] += xy

    def __add__(self, other: Gram) -> Gram:
        return Gram(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __getitem__(self, pair: int) -> Gram:
        """The sums of one pair, as views."""
        return Gram(*(getattr(self, f.name)[pair : pair + 1] for f in fields(self)))

    def to(self, device: torch.device) -> Gram:
        return Gram(*(getattr(self, f.name).to(device) for f in fields(self)))

    def scale_update(self, factor: float) -> Gram:
        """The sums for y = x + factor · (y − x), of pairs of equal width."""
        rest = 1 - factor
        traces = [matrix.diagonal(dim1=-2, dim2=-1).sum(-1) for matrix in (self.xx, self.xy)]
        return Gram(
            self.num_tokens,
            self.sum_x,
            rest * self.sum_x + factor * self.sum_y,
            self.xx,
            rest * self.xx + factor * self.xy,
            rest**2 * traces[0] + 2 * rest * factor * traces[1] + factor**2 * self.yy,
        )

    def to_update(self) -> Gram:
        """The sums of the pairs (x, y − x), of equal width."""
        traces = [matrix.diagonal(dim1=-2, dim2=-1).sum(-1) for matrix in (self.xx, self.xy)]
        return Gram(
            self.num_tokens,
            self.sum_x,
            self.sum_y - self.sum_x,
            self.xx,
            self.xy - self.xx,
            self.yy - 2 * traces[1] + traces[0],
        )

    def through_origin(self) -> Gram:
        """The sums for a fit without intercept: means count as zero."""
        none_x, none_y = torch.zeros_like(self.sum_x), torch.zeros_like(self.sum_y)
        return Gram(self.num_tokens, none_x, none_y, self.xx, self.xy, self.yy)

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariance sums of the first pair: Σ (x−x̄)(x−x̄)ᵀ [d, d], Σ (x−x̄)(y−ȳ)ᵀ [d, e], Σ ‖y−ȳ‖² []."""
        n = self.num_tokens[0].clamp(min=1)
        xx = self.xx[0] - torch.outer(self.sum_x[0], self.sum_x[0]) / n
        xy = self.xy[0] - torch.outer(self.sum_x[0], self.sum_y[0]) / n
        return xx, xy, self.yy[0] - self.sum_y[0].square().sum() / n
