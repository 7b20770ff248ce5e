"""Logarithmic axes that say numbers wherever they are: over decades, and between 6 and 7."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

# Ever finer; plotly itself labels such an axis 2, 3, 4 between powers of ten, where one wants to read 20, 30, 40.
STEPS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
MIN_TICKS = 4


def log_axis(title: str, values: Iterable[float | None]) -> dict[str, Any]:
    """A plotly axis over all positive values among these, with at least four numbers on it."""
    shown = [value for value in values if value is not None and 0 < value < math.inf] or [1.0, 10.0]
    bottom, top = math.log10(min(shown)), math.log10(max(shown))
    margin = max(0.01, (top - bottom) / 20)
    # No number is larger than 1e308.
    bounds = [max(-300, bottom - margin), min(300, top + margin)]
    ticks = find_ticks(10 ** bounds[0], 10 ** bounds[1])
    texts = [f"{tick:,.10g}" if tick >= 1e-3 else f"{tick:g}" for tick in ticks]
    return {"title": title, "type": "log", "range": bounds, "tickvals": ticks, "ticktext": texts}


def find_ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, four at least and as few more as can be; evenly spaced where they are close."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in STEPS:
        ticks = [float(f"{step}e{power}") for power in decades for step in steps]
        if len(ticks := [tick for tick in ticks if low <= tick <= high]) >= MIN_TICKS:
            return ticks[:: math.ceil(len(ticks) / 12)]
    power = math.floor(math.log10((high - low) / MIN_TICKS))
    for step in (float(f"{mantissa}e{exponent}") for exponent in (power, power - 1) for mantissa in (5, 2, 1)):
        first, last = math.ceil(low / step), math.floor(high / step)
        if last - first + 1 >= MIN_TICKS:
            return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
    return [low, high]
