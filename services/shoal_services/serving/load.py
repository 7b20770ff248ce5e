"""A load generator for OpenAI-compatible endpoints: closed loop (so many at once) or open loop (so many a second)."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Load:
    """What to send: streamed completions of `num_new` tokens each, past the end of the text where `ignore_eos`."""

    url: str
    model: str
    prompts: list[str]
    num_requests: int
    num_new: int = 64
    concurrency: int | None = None
    rate_per_s: float | None = None
    ignore_eos: bool = True
    key: str | None = None
    seed: int = 0


@dataclass
class TimedAnswer:
    """The times of one request, in seconds since it was sent. `status` 0 means the connection broke."""

    status: int = 0
    first_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    total_s: float = 0.0
    num_tokens: int = 0
    finished: bool = False


@dataclass(frozen=True)
class LoadResult:
    """What came of a load. Times are percentiles over requests (gaps: over pieces), NaN where nothing was measured."""

    model: str
    wall_s: float
    answers: list[TimedAnswer]

    @property
    def num_failed(self) -> int:
        """Requests without a whole answer."""
        return sum(not answer.finished for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the whole wall time."""
        return sum(answer.num_tokens for answer in self.answers) / self.wall_s

    def time_to_first_token_ms(self, percent: float) -> float:
        """From sending to the first piece of text."""
        return _percentile([a.first_s for a in self.answers if a.first_s is not None and a.finished], percent) * 1e3

    def inter_token_ms(self, percent: float) -> float:
        """Between two pieces of one answer."""
        return _percentile([gap for a in self.answers if a.finished for gap in a.gaps_s], percent) * 1e3

    def latency_ms(self, percent: float) -> float:
        """From sending to the end of the answer."""
        return _percentile([a.total_s for a in self.answers if a.finished], percent) * 1e3


async def run_load(load: Load, on_progress: Callable[[int, int], None] = lambda _done, _total: None) -> LoadResult:
    """Sends the load and waits for all answers."""
    done = 0
    answers: list[TimedAnswer] = []
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"authorization": f"Bearer {load.key}"} if load.key else {}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        gate = asyncio.Semaphore(load.concurrency or load.num_requests)
        arrivals = _arrivals(load)

        async def one(index: int) -> None:
            nonlocal done
            await asyncio.sleep(arrivals[index])
            async with gate:
                answers.append(await _ask(session, load, load.prompts[index % len(load.prompts)]))
            done += 1
            on_progress(done, load.num_requests)

        start = time.perf_counter()
        await asyncio.gather(*(one(index) for index in range(load.num_requests)))
        return LoadResult(load.model, time.perf_counter() - start, answers)


def _arrivals(load: Load) -> list[float]:
    """When each request is sent: at once, or at random moments with `rate_per_s` on average (a Poisson process)."""
    if load.rate_per_s is None:
        return [0.0] * load.num_requests
    generator, moment, moments = random.Random(load.seed), 0.0, []
    for _ in range(load.num_requests):
        moments.append(moment)
        moment += generator.expovariate(load.rate_per_s)
    return moments


async def _ask(session: aiohttp.ClientSession, load: Load, prompt: str) -> TimedAnswer:
    body = {
        "model": load.model, "prompt": prompt, "max_tokens": load.num_new, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, **({"ignore_eos": True} if load.ignore_eos else {}),
    }  # fmt: skip
    answer, start, last = TimedAnswer(), time.perf_counter(), None
    try:
        async with session.post(f"{load.url}/completions", json=body) as response:
            answer.status = response.status
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    answer.finished = True
                    break
                chunk, now = json.loads(line[6:]), time.perf_counter()
                if chunk.get("usage"):
                    answer.num_tokens = chunk["usage"]["completion_tokens"]
                if chunk.get("choices"):
                    if last is None:
                        answer.first_s = now - start
                    else:
                        answer.gaps_s.append(now - last)
                    last = now
    except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError):
        answer.finished = False
    answer.total_s = time.perf_counter() - start
    return answer


def _percentile(values: list[float], percent: float) -> float:
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=1000, method="inclusive")[min(998, round(percent * 10) - 1)]
