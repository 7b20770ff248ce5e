"""A number measured with several seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error, None for a single seed."""

    mean: float
    standard_error: float | None
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))

    def text(self, digits: int, *, sign: bool = False) -> str:
        shown = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return shown if self.standard_error is None else f"{shown} ± {self.standard_error:.{digits}f}"
