"""What routes (A/B) and shadows have shown, written to MLflow: one run for each variant of a route, and each shadow."""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path

from shoal_services.serving.http.record import Comparison, Outcome
from shoal_services.tracking.tracker import Tracker

PATIENCE_S = 5.0
# Enough for a 99th percentile; older ones have had their step.
MAX_KEPT = 10_000
WAITING = ("all", "wait")


class Observer:
    """A Serve deployment of one replica. What it holds is cumulative since the endpoint's start (`session`)."""

    def __init__(self, folder: str, tracking_uri: str | None, experiment: str, every_s: float, session: str):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tracker = Tracker(Path(folder), uri=tracking_uri, experiment=experiment)
        for run, has_ended in self.tracker.find_ended().items():
            if not has_ended:  # of an endpoint that was killed
                self.tracker.end_run(run, "KILLED")
        self._said: set[tuple[str, str]] = set()
        self.session, self.every_s = session, every_s
        self.started = time.time()
        self._seen: dict[tuple[str, str, str], list[Outcome | Comparison]] = defaultdict(list)
        self._counts: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
        self._changed: set[tuple[str, str, str]] = set()
        self._task: asyncio.Task[None] | None = None

    async def observe(self, told: list[Outcome | Comparison]) -> None:
        """Takes what a gateway tells; MLflow has it within `every_s` seconds."""
        for one in told:
            if isinstance(one, Outcome):
                key, result = ("route", one.route, one.variant), one.result
            else:
                key, result = ("shadow", one.variant, one.shadow), "answered" if one.shadow_latency_ms else "failed"
            if key not in self._seen:
                kind, name, variant = key
                self.tracker.start_run(self._run(key), f"{kind} {name}: {variant}", params={kind: name, "variant": variant})
            self._counts[key][result] += 1
            self._seen[key].append(one)
            del self._seen[key][:-MAX_KEPT]
            self._changed.add(key)
        if self._task is None:
            self._task = asyncio.create_task(self._write_forever())

    async def _write_forever(self) -> None:
        while True:
            await asyncio.sleep(self.every_s)
            self.write()

    def write(self) -> None:
        """Sends the metrics of everything that has changed, at a step of seconds since the start."""
        step = int(time.time() - self.started)
        for key in self._changed:
            self.tracker.log_metrics(self._run(key), summarise(self._counts[key], self._seen[key]), step=step)
        self._changed.clear()
        self._warn()

    def _warn(self) -> None:
        """Says in the log what does not arrive, once for each cause."""
        delivery = self.tracker.delivery
        causes = {*delivery.refused, *([WAITING] if delivery.problem else [])}
        if causes - self._said:
            logging.getLogger("ray.serve").warning("; ".join(delivery.complaints()))
        self._said = causes

    async def __del__(self) -> None:
        self.write()
        for key in self._seen:
            self.tracker.end_run(self._run(key), "FINISHED")
        await asyncio.to_thread(self.tracker.close, patience_s=PATIENCE_S)

    def _run(self, key: tuple[str, str, str]) -> str:
        return "/".join(("serving", self.session, *key))


def summarise(counts: Counter[str], seen: list[Outcome | Comparison]) -> dict[str, float]:
    """Metrics of a run: how many requests came to what, latencies, and a shadow's agreement with its standard error."""
    metrics = {result: float(count) for result, count in counts.items()} | {"requests": float(counts.total())}
    answered = [one for one in seen if one.latency_ms is not None]
    metrics |= _spread("latency_ms", [one.latency_ms for one in answered if one.latency_ms is not None])
    outcomes = [one for one in answered if isinstance(one, Outcome)]
    metrics |= _spread("first_token_ms", [one.first_token_ms for one in outcomes if one.first_token_ms is not None])
    compared = [one for one in seen if isinstance(one, Comparison) and one.shadow_latency_ms is not None]
    if compared:
        metrics |= _spread("shadow_latency_ms", [one.shadow_latency_ms or 0.0 for one in compared])
        metrics |= _mean("agreement", [one.num_equal / max(1, one.num_tokens) for one in compared])
        metrics |= _mean("identical", [float(one.num_equal == one.num_tokens) for one in compared])
    return metrics


def _spread(name: str, values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {f"{name}_mean": values[0]} if values else {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {**_mean(f"{name}_mean", values), f"{name}_p50": cuts[49], f"{name}_p99": cuts[98]}


def _mean(name: str, values: list[float]) -> dict[str, float]:
    """The mean, and its standard error where there are two values or more."""
    error = {f"{name}_standard_error": statistics.stdev(values) / len(values) ** 0.5} if len(values) > 1 else {}
    return {name: statistics.fmean(values), **error}
