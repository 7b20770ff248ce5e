"""Points in, the size/quality frontier out. Pure functions over anything that has a size and a perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar


class SizedAndScored(Protocol):
    """Anything with a size and a perplexity: a `Point`, or a stand-in for the dense model."""

    @property
    def perplexity(self) -> float: ...

    @property
    def num_parameters(self) -> int: ...


P = TypeVar("P", bound=SizedAndScored)


def find_frontier(points: Sequence[P], *, ceiling: float = math.inf) -> list[P]:
    """The points that no other point beats, smallest first.

    A point is beaten if another is no larger and has no higher perplexity, and is better in one of the two. Of
    equal points the first stays. A perplexity that is not finite, or above `ceiling`, is never on the frontier.
    """
    alive = [p for p in points if math.isfinite(p.perplexity) and p.perplexity <= ceiling]
    frontier: list[P] = []
    for point in sorted(alive, key=lambda p: (p.num_parameters, p.perplexity)):
        if not frontier or point.perplexity < frontier[-1].perplexity:
            frontier.append(point)
    return frontier


def find_knee(frontier: Sequence[P]) -> P:
    """The point of the frontier furthest below the straight line between its two ends.

    Axes are parameters and log perplexity, each scaled to [0, 1] over the frontier (the "kneedle" idea of
    Satopää et al. 2011). With one or two points it is the one of lowest perplexity.
    """
    if not frontier:
        raise ValueError("the frontier is empty: no trial finished below the perplexity ceiling")
    if len(frontier) < 3:
        return min(frontier, key=lambda p: p.perplexity)
    sizes = [p.num_parameters for p in frontier]
    losses = [math.log(p.perplexity) for p in frontier]
    fall = losses[0] - losses[-1] or 1.0  # perplexities a rounding error apart have one logarithm

    def depth(i: int) -> float:
        x = (sizes[i] - sizes[0]) / (sizes[-1] - sizes[0])
        y = (losses[i] - losses[-1]) / fall
        return 1 - x - y

    return frontier[max(range(len(frontier)), key=depth)]


def find_best_within(points: Sequence[P], *, max_parameters: int) -> P:
    """The point of lowest perplexity with at most `max_parameters` parameters.

    Raises ValueError if none is that small.
    """
    working = [p for p in points if math.isfinite(p.perplexity)]
    fitting = [p for p in working if p.num_parameters <= max_parameters]
    if not fitting:
        smallest = min((p.num_parameters for p in working), default=0)
        raise ValueError(f"no point has {max_parameters:,} parameters or fewer; the smallest has {smallest:,}")
    return min(fitting, key=lambda p: p.perplexity)


def name_picks(frontier: Sequence[P]) -> dict[str, P]:
    """The named picks: `best` (lowest perplexity), `balanced` (the knee), `smallest`."""
    if not frontier:
        return {}
    return {
        "best": min(frontier, key=lambda p: p.perplexity),
        "balanced": find_knee(frontier),
        "smallest": min(frontier, key=lambda p: p.num_parameters),
    }
