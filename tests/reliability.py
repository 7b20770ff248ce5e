"""What the endpoint bears, measured and printed: `make reliability`, or `python tests/reliability.py overload kill`.

Each row is a fault or a load put on a real endpoint over HTTP, what came of it, and the bound that the project sets
itself. The exit code is 1 if a bound is broken. `--model smollm2-135m` takes a real model instead of a tiny one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import mlflow
import psutil
from scenarios import Row, parse_choice, print_rows
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.checkpoints.store import save
from shoal.recipe import Recipe
from shoal_services.cluster.connect import connect
from shoal_services.serving.endpoint import Endpoint
from shoal_services.serving.load import Load, LoadResult, run_load
from shoal_services.serving.settings import Limits, ServeSettings, VariantSettings
from shoal_services.tracking.registry import PLACE_TAG

NUM_NEW = 32
# Waiting is what makes latency under overload: here nobody waits.
TIGHT = Limits(max_batch_size=4, max_queued=0, max_context=256, max_tokens=64)
ROOMY = Limits(max_batch_size=8, max_queued=64, max_context=256, max_tokens=64)
PROMPTS = ["The sea was calm when", "A ship that", "In the north of the country", "Nobody knew"]


@contextmanager
def serving(models: list[str], limits: Limits, **settings: object) -> Iterator[Endpoint]:
    """An endpoint with the variants `a`, `b` … of these models."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    variants = {name: VariantSettings(model=model) for name, model in zip("abc", models, strict=False)}
    endpoint = Endpoint(ServeSettings.model_validate({"port": port, "variants": variants, "limits": limits, **settings}))
    endpoint.start(lambda *_: None)
    try:
        load(endpoint, 2 * limits.max_batch_size, concurrency=2)  # whatever is slow once
        yield endpoint
    finally:
        endpoint.stop()


def load(endpoint: Endpoint, num_requests: int, **more: object) -> LoadResult:
    """Sends streamed requests to the variant `a` and waits for the answers."""
    given = {"num_new": NUM_NEW, **more}
    return asyncio.run(run_load(Load(f"{endpoint.url}/v1", "a", PROMPTS, num_requests, **given)))  # type: ignore[arg-type]


def count(result: LoadResult) -> Counter[str]:
    """How many answers of which kind: whole, broken off, or an error's status."""
    kinds = ["whole" if a.finished else "broken off" if a.status in (0, 200) else str(a.status) for a in result.answers]
    return Counter(kinds)


@contextmanager
def constant_load(endpoint: Endpoint, seconds: float) -> Iterator[Future[LoadResult]]:
    """Load at a third of what the variant can bear, for as long as the block and for at least `seconds`."""
    rate = 0.33 * measure_capacity(endpoint)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(load, endpoint, max(30, round(rate * seconds)), rate_per_s=rate)
        time.sleep(2)
        yield future


def measure_capacity(endpoint: Endpoint) -> float:
    """Requests a second with every row taken."""
    rows = endpoint.settings.limits.max_batch_size
    return 8 * rows / load(endpoint, 8 * rows, concurrency=rows).wall_s


def find_processes(name: str) -> list[psutil.Process]:
    """Processes of this script's Ray whose title holds `name`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def overload(model: str) -> list[Row]:
    """Three times as many requests as the variant can bear, for 40 s."""
    with serving([model], TIGHT) as endpoint:
        alone = load(endpoint, 20, concurrency=1)
        capacity = measure_capacity(endpoint)
        rate = 3 * capacity
        over = load(endpoint, round(40 * rate), rate_per_s=rate)
        found = count(over)
        ratio = over.latency_ms(99) / alone.latency_ms(99)
        said = f"{dict(found)}; p99 {over.latency_ms(99):.0f} ms, unloaded {alone.latency_ms(99):.0f} ms: {ratio:.2f} ×"
        return [
            Row("overload × 3: accepted requests' p99", said, "≤ 2 × unloaded", ratio <= 2),
            Row("overload × 3: the rest", f"{dict(found)}", "429, nothing else", set(found) <= {"whole", "429"}),
        ]


def memory(model: str, num_requests: int = 10_000) -> list[Row]:
    """Ten thousand requests; memory after the first tenth and after the last."""
    with serving([model], ROOMY) as endpoint:

        def resident() -> dict[str, float]:
            titles = {"replica": "ServeReplica:a-", "gateway": "ServeReplica:gateway", "proxy": "ProxyActor"}
            return {what: sum(p.memory_info().rss for p in find_processes(t)) / 2**20 for what, t in titles.items()}

        load(endpoint, num_requests // 10, concurrency=16, num_new=4)
        before = resident()
        found = count(load(endpoint, num_requests - num_requests // 10, concurrency=16, num_new=4))
        after = resident()
        said = ", ".join(f"{what} {before[what]:.0f} → {after[what]:.0f} MiB" for what in before)
        flat = all(after[what] <= 1.05 * before[what] + 8 for what in before)
        return [
            Row(f"{num_requests:,} requests: memory", said, "≤ 5 % + 8 MiB more", flat),
            Row(f"{num_requests:,} requests: answers", f"{dict(found)}", "all whole", set(found) == {"whole"}),
        ]


def slow(model: str) -> list[Row]:
    """Four clients that read a line every half second, or leave after the first, instead of four ordinary ones."""
    with serving([model], ROOMY) as endpoint:
        ordinary = load(endpoint, 40, concurrency=5)
        stop = threading.Event()

        async def read_slowly(index: int) -> None:
            body = {"model": "a", "prompt": "The sea", "max_tokens": 64, "ignore_eos": True, "stream": True}
            async with aiohttp.ClientSession(read_bufsize=256) as session:
                while not stop.is_set():
                    async with session.post(f"{endpoint.url}/v1/completions", json=body) as response:
                        async for _ in response.content:
                            if index % 2 or stop.is_set():
                                break
                            await asyncio.sleep(0.5)
                    await asyncio.sleep(0.2)

        async def read_all() -> None:
            await asyncio.gather(*(read_slowly(index) for index in range(4)))

        thread = threading.Thread(target=lambda: asyncio.run(read_all()))
        thread.start()
        time.sleep(1)
        beside = load(endpoint, 20, concurrency=1)
        stop.set()
        thread.join()
        p50, ordinary_p50 = beside.latency_ms(50), ordinary.latency_ms(50)
        said = f"{dict(count(beside))}; p50 {p50:.0f} ms, beside four ordinary clients {ordinary_p50:.0f} ms"
        good = count(beside) == {"whole": 20} and p50 <= 1.5 * ordinary_p50
        return [Row("beside four slow readers and leavers", said, "all whole, p50 ≤ 1.5 ×", good)]


def kill(model: str) -> list[Row]:
    """A replica killed with SIGKILL under load."""
    with serving([model], ROOMY) as endpoint, constant_load(endpoint, 30) as future:
        victim = find_processes("ServeReplica:a-")[0]
        in_flight = ROOMY.max_batch_size
        os.kill(victim.pid, signal.SIGKILL)
        killed = time.monotonic()
        while not future.done() and count(load(endpoint, 1, num_new=1)) != {"whole": 1}:
            time.sleep(0.1)
        seconds = time.monotonic() - killed
        found = count(future.result())
        failed = found["broken off"] + found["503"]
        return [
            Row("kill -9 of a replica: lost", f"{dict(found)}", f"≤ {in_flight} in flight", failed <= in_flight),
            Row("kill -9 of a replica: back after", f"{seconds:.1f} s", "≤ 10 s", seconds <= 10),
        ]


def roll(model: str) -> list[Row]:
    """Another version and back under load, then an alias of the MLflow registry that moves."""
    with tempfile.TemporaryDirectory() as folder:
        folders = copy_twice(model, Path(folder))
        uri = f"sqlite:///{folder}/mlflow.db"
        client = mlflow.MlflowClient(uri)
        client.create_registered_model("m")
        for place in folders:
            client.create_model_version("m", place, tags={PLACE_TAG: place})
        client.set_registered_model_alias("m", "live", "1")
        with serving([folders[0]], ROOMY) as endpoint:
            with constant_load(endpoint, 30) as future:
                before = endpoint.settings
                changed = before.model_copy(update={"variants": {"a": VariantSettings(model=folders[1])}})
                endpoint.reconcile(changed)
                endpoint.reconcile(before)
            updated = count(future.result())
        with serving(["models:/m@live"], ROOMY, tracking_uri=uri) as endpoint:
            with constant_load(endpoint, 30) as future:
                client.set_registered_model_alias("m", "live", "2")
                moved = endpoint.reconcile()
            switched = count(future.result())
        assert moved == [f"a is now {folders[1]}"], moved
    return [
        Row("another version and back", f"{dict(updated)}", "all whole", set(updated) == {"whole"}),
        Row("an alias moves", f"{dict(switched)}", "all whole", set(switched) == {"whole"}),
    ]


def drain(model: str) -> list[Row]:
    """The endpoint stopped while it streams."""
    with ThreadPoolExecutor(1) as pool:
        with serving([model], ROOMY) as endpoint:
            future = pool.submit(load, endpoint, 8, num_new=64)
            time.sleep(0.5)
            under_way = not future.done()
        found = count(future.result())
    said = f"{dict(found)}{'' if under_way else ', done before the stop'}"
    return [Row("stopped while it streams", said, "all whole", under_way and set(found) == {"whole"})]


def copy_twice(model: str, root: Path) -> list[str]:
    """Two folders that hold the model."""
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    for name in ("first", "second"):
        save(loaded, tokenizer, root / name, recipe=Recipe(base_model=model, num_replaced=0))
    return [str(root / name) for name in ("first", "second")]


SCENARIOS: list[Callable[[str], list[Row]]] = [overload, slow, kill, roll, drain, memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-random", help="what is served (default: %(default)s)")
    given, chosen = parse_choice(parser, SCENARIOS)
    connect(None)
    rows = (row for scenario in chosen for row in scenario(given.model))
    print_rows(f"serving {given.model} on {os.cpu_count()} cores", "what came of it", rows)


if __name__ == "__main__":
    main()
