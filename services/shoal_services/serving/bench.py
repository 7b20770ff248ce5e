"""`shoal bench-serve`: the same prompts to every model, at every load, in turns."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table
from shoal.text.sources import load_documents

from shoal_services.serving.load import Load, LoadResult, run_load

NUM_PROMPTS = 64


@dataclass(frozen=True)
class Bench:
    """What to compare, and under which loads."""

    url: str
    models: tuple[str, ...]
    concurrencies: tuple[int, ...]
    rates: tuple[float, ...] = ()
    num_requests: int | None = None
    num_new: int = 64
    prompt_chars: int = 600
    text: str = "wikipedia-sample"
    key: str | None = None
    ignore_eos: bool = True


@dataclass(frozen=True)
class BenchRow:
    """One model under one load."""

    load: str
    result: LoadResult

    @property
    def num_failed(self) -> int:
        return self.result.num_failed

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON-able values, times in milliseconds."""
        result = self.result
        return {
            "model": result.model, "load": self.load, "requests": len(result.answers), "failed": result.num_failed,
            "tokens_per_s": result.tokens_per_s,
            **{f"ttft_p{p}_ms": result.time_to_first_token_ms(p) for p in (50, 99)},
            **{f"inter_token_p{p}_ms": result.inter_token_ms(p) for p in (50, 99)},
            **{f"latency_p{p}_ms": result.latency_ms(p) for p in (50, 99)},
        }  # fmt: skip


def run_bench(bench: Bench, listen: Callable[[str, int, int], None]) -> list[BenchRow]:
    """Rows by load, and in it by model, so that models compared stand side by side in time.

    Raises ConnectionError if nothing answers at the URL.
    """
    prompts = cut_prompts(bench)
    rows = []
    for name, load in _make_loads(bench, prompts):
        for model in bench.models:
            warm = replace(load, model=model, num_requests=2, num_new=4, concurrency=1, rate_per_s=None)
            if all(answer.status == 0 for answer in asyncio.run(run_load(warm)).answers):
                raise ConnectionError(f"nothing answers at {bench.url!r}; start it with `shoal serve`, or give --url")
            stage = f"{model}, {name}"
            result = asyncio.run(run_load(replace(load, model=model), functools.partial(listen, stage)))
            rows.append(BenchRow(name, result))
    return rows


def _make_loads(bench: Bench, prompts: list[str]) -> list[tuple[str, Load]]:
    """The loads by name, of no model yet."""

    def make(num_requests: int, *, concurrency: int | None = None, rate_per_s: float | None = None) -> Load:
        return Load(
            bench.url, "", prompts, bench.num_requests or num_requests, bench.num_new, concurrency, rate_per_s,
            bench.ignore_eos, bench.key,
        )  # fmt: skip

    if bench.rates:
        return [(f"{rate:g} a second", make(60, rate_per_s=rate)) for rate in bench.rates]
    return [(f"{c} at once", make(max(6, 2 * c), concurrency=c)) for c in bench.concurrencies]


def cut_prompts(bench: Bench) -> list[str]:
    """Pieces of the text, each of `prompt_chars` characters and none of them twice.

    Raises ValueError if the text is too short for one.
    """
    text = "\n".join(load_documents(bench.text).texts)
    starts = range(0, len(text) - bench.prompt_chars, max(bench.prompt_chars, 1))
    prompts = [text[start : start + bench.prompt_chars] for start in starts][:NUM_PROMPTS]
    if not prompts:
        raise ValueError(f"text {bench.text!r} has {len(text)} characters, fewer than a prompt of {bench.prompt_chars}")
    return prompts


def load_table(url: str, rows: list[BenchRow]) -> Table:
    """The rows for a terminal."""
    caption = "ttft: time to first token. between: time between two pieces of one answer. Milliseconds."
    table = Table(title=url, caption=caption, caption_justify="left")
    for column in ("load", "model", "requests", "failed", "tokens/s", "ttft p50", "p99", "between p50", "p99"):
        table.add_column(column, justify="left" if column in ("load", "model") else "right")
    for row in rows:
        result = row.result
        times = [f"{result.time_to_first_token_ms(p):,.0f}" for p in (50, 99)]
        times += [f"{result.inter_token_ms(p):,.1f}" for p in (50, 99)]
        counts = [str(len(result.answers)), str(result.num_failed)]
        table.add_row(row.load, result.model, *counts, f"{result.tokens_per_s:,.1f}", *times)
    return table
