"""Which variant answers: the named one, or one of a route's by weight. Pure: equal user, equal variant."""

from __future__ import annotations

import difflib
import hashlib
import random
from typing import Any


class UnknownModel(LookupError):
    """There is neither a variant nor a route of that name."""


class Router:
    """Public model names → variants. `variants` maps each name to its card, `routes` each name to variants' weights."""

    def __init__(self, variants: dict[str, dict[str, Any]], routes: dict[str, dict[str, float]]):
        self.variants, self.routes = variants, routes

    def choose(self, model: str, user: str | None) -> str:
        """The variant for a request; of a route, always the same for one user. Raises `UnknownModel`."""
        if model in self.variants:
            return model
        if model not in self.routes:
            known = [*self.variants, *self.routes]
            near = difflib.get_close_matches(model, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise UnknownModel(f"the model {model!r} does not exist; {hint}")
        weights = self.routes[model]
        point = _hash_fraction(f"{model}\0{user}") if user is not None else random.random()
        point *= sum(weights.values())
        for name, weight in weights.items():
            point -= weight
            if point < 0:
                return name
        return max(weights, key=lambda name: weights[name])


def _hash_fraction(text: str) -> float:
    """A number in [0, 1) that is the same for equal texts, everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
