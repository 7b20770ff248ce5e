"""What a variant's replica measures of itself, for Prometheus: Ray exports it on every node's metrics port."""

from __future__ import annotations

import time

from ray.util.metrics import Counter, Gauge, Histogram

from shoal_services.serving.engine.generation import Delta, EngineStatistics

LATENCY_MS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 3e4]


class Meters:
    """Names begin with `shoal_` (Ray puts `ray_` before); every value has the tag `variant`."""

    def __init__(self, variant: str):
        tags = {"variant": variant}

        def histogram(name: str, what: str) -> Histogram:
            made = Histogram(name, what, boundaries=LATENCY_MS, tag_keys=("variant",))
            made.set_default_tags(tags)
            return made

        def counter(name: str, what: str) -> Counter:
            made = Counter(name, what, tag_keys=("variant",))
            made.set_default_tags(tags)
            return made

        def gauge(name: str, what: str) -> Gauge:
            made = Gauge(name, what, tag_keys=("variant",))
            made.set_default_tags(tags)
            return made

        self.first_token = histogram("shoal_time_to_first_token_ms", "from the call to the first token")
        self.inter_token = histogram("shoal_inter_token_ms", "between tokens, mean over a text")
        self.prompt_tokens = counter("shoal_prompt_tokens", "tokens of prompts")
        self.generated_tokens = counter("shoal_generated_tokens", "tokens generated")
        self.running = gauge("shoal_batch_size", "requests in the batch")
        self.waiting = gauge("shoal_queue_length", "requests that wait for a row")

    def show(self, statistics: EngineStatistics) -> None:
        """Tells how busy the engine is."""
        self.running.set(statistics.running)
        self.waiting.set(statistics.waiting)


class RequestTimes:
    """The times of one request."""

    def __init__(self, meters: Meters, num_prompt_tokens: int):
        self.meters, self.num_prompt_tokens, self.start = meters, num_prompt_tokens, time.perf_counter()
        self.first: float | None = None
        self.num_tokens = 0

    def hear(self, delta: Delta) -> None:
        """Counts a piece as it comes; the last piece records what the request came to."""
        if self.first is None and delta.tokens:
            self.first = time.perf_counter()
            self.meters.first_token.observe((self.first - self.start) * 1e3)
        self.num_tokens += len(delta.tokens)
        if delta.finish_reason is not None and self.num_tokens:
            self.meters.prompt_tokens.inc(self.num_prompt_tokens)
            self.meters.generated_tokens.inc(self.num_tokens)
            if self.first is not None and self.num_tokens > 1:
                self.meters.inter_token.observe((time.perf_counter() - self.first) * 1e3 / (self.num_tokens - 1))
