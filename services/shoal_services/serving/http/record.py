"""The record of a request, as a gateway sees it, and what is told of it: an outcome, and a comparison with a shadow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from shoal_services.serving.engine.generation import Call, Piece

Result = Literal["answered", "refused", "failed", "left"]


@dataclass(frozen=True)
class Outcome:
    """How a route's request went at the variant that was chosen. No times where it was not answered."""

    route: str
    variant: str
    result: Result
    num_tokens: int
    first_token_ms: float | None
    latency_ms: float | None


@dataclass(frozen=True)
class Comparison:
    """What a shadow said beside what the client got: how many tokens of the longer answer are equal up to the first
    difference, and both latencies. A shadow that did not answer has no latency."""

    variant: str
    shadow: str
    num_tokens: int
    num_equal: int
    latency_ms: float
    shadow_latency_ms: float | None


@dataclass
class RequestRecord:
    """One request on its way. `end` is said once, by whoever sees the end first."""

    variant: str
    route: str | None
    calls: list[Call]
    on_end: Callable[[RequestRecord], None]
    result: Result | None = None
    started: float = field(default_factory=time.perf_counter)
    first_token_ms: float | None = None
    latency_ms: float | None = None
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def hear(self, index: int, piece: Piece) -> None:
        """A piece of the answer to call number `index` came."""
        if self.first_token_ms is None and piece.delta.tokens and piece.delta.finish_reason is None:
            self.first_token_ms = self._elapsed_ms()
        self.tokens.setdefault(index, []).extend(token.id for token in piece.delta.tokens)

    def end(self, result: Result) -> None:
        """The request is over."""
        if self.result is None:
            self.result = result
            self.latency_ms = self._elapsed_ms() if result == "answered" else None
            self.on_end(self)

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self.started) * 1e3


def count_equal(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first difference."""
    pairs = zip(ours, theirs, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))
