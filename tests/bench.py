"""Speed and memory as ratios measured in one run: `make bench`, or `python tests/bench.py calibrate linearity`.

Each row says what is compared, the ratio, and the bound that the project sets itself. Medians of several rounds in
turns, so that other load on the machine hits both sides.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from dummy_trials import DummySweep, measure_overhead
from rich.console import Console
from rich.table import Table
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.gram import Gram
from shoal.linearity.scores import score_gram
from shoal.measure.perplexity import evaluate
from shoal.measure.targets import measure_targets
from shoal.text.corpus import load_corpus
from shoal.text.windows import TokenWindows
from shoal.texts import Texts
from shoal_services.serving.endpoint import Endpoint
from shoal_services.serving.engine.decoder import BatchedDecoder
from shoal_services.serving.engine.engine import Engine
from shoal_services.serving.engine.generation import Generation, Sampling
from shoal_services.serving.settings import Limits, ServeSettings

MODEL = "smollm2-135m"


def time_in_turns(*works: Callable[[], object], rounds: int = 3) -> list[float]:
    """Median seconds of each piece of work, after one round to warm up."""
    seconds: list[list[float]] = [[] for _ in works]
    for round_index in range(rounds + 1):
        for work, taken in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            if round_index:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def load_windows(num_tokens: int, window: int = 1024) -> TokenWindows:
    texts = Texts(calibration_tokens=num_tokens, window=window)
    return load_corpus(texts, load_tokenizer(MODEL), load_model(MODEL).config).calibration


@torch.no_grad()
def calibrate() -> list[tuple[str, str, str]]:
    """The moments pass beside a bare forward pass with LM head over the same tokens in the same dtype."""
    model, windows = load_model(MODEL), load_windows(16_384)

    def forward() -> None:
        for ids in windows.ids.split(8):
            model(input_ids=ids.to(model.device), use_cache=False)

    passed, moments = time_in_turns(forward, lambda: measure_moments(model, windows))
    rate = windows.num_tokens / moments
    return [(f"moments pass / forward pass ({rate:,.0f} tokens/s)", f"{moments / passed:.2f} ×", "≤ 1.15 ×")]


def memory() -> list[tuple[str, str, str]]:
    """Peak resident memory of a process that calibrates on few and on many tokens."""
    code = (
        "import re, sys, pathlib; sys.path.insert(0, 'tests'); import bench\n"
        "from shoal.linearity.accumulate import measure_moments; from shoal.checkpoints.load import load_model\n"
        "from shoal.text.windows import TokenWindows\n"
        "w = bench.load_windows(8192); n = int(sys.argv[1]) // 1024\n"
        "w = TokenWindows(w.ids.repeat(n // len(w) + 1, 1)[:n], 'repeated')\n"
        "measure_moments(load_model(bench.MODEL), w, batch_size=4)\n"
        "# Unlike ru_maxrss, this peak begins with the process and not with the one that started it.\n"
        "print(int(re.search(r'VmHWM:\\s*(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]) / 1024)"
    )
    peaks = []
    for num_tokens in (8_192, 262_144):
        done = subprocess.run([sys.executable, "-c", code, str(num_tokens)], capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.split()[-1]))
    label = f"peak memory, 256k tokens / 8k tokens ({peaks[1]:,.0f} / {peaks[0]:,.0f} MiB)"
    return [(label, f"{peaks[1] / peaks[0]:.2f} ×", "≤ 1.05 ×")]


def linearity() -> list[tuple[str, str, str]]:
    """All pairs of 14,336 tokens: scores from moments beside the SVD procedure of arXiv 2405.12250."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(14_336, 576, generator=generator)
    y = x + 0.3 * torch.randn(14_336, 576, generator=generator)

    def by_svd() -> float:
        a, b = x - x.mean(0), y - y.mean(0)
        a, b = a / a.norm(), b / b.norm()
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        return float(1 - (a @ (vh.T * (1 / s) @ u.T @ b) - b).square().sum())

    def by_moments() -> float:
        gram = Gram.zeros(1, 576, 576)
        gram.add(0, x.bfloat16(), y.bfloat16())
        return score_gram(gram)[0]

    svd, moments = time_in_turns(by_svd, by_moments)
    label = f"linearity of one block, SVD / moments (scores {by_svd():.4f}, {by_moments():.4f})"
    return [(label, f"{svd / moments:.0f} ×", "≥ 10 ×")]


def dtypes() -> list[tuple[str, str, str]]:
    """Evaluation in bfloat16 beside float32."""
    results, works = [], []
    for dtype in ("float32", "bfloat16"):
        model = load_model(MODEL, dtype=dtype)
        texts = Texts(evaluation_tokens=4_096)
        windows = load_corpus(texts, load_tokenizer(MODEL), model.config).evaluation[0]
        dense = measure_targets(model, windows)
        results.append(evaluate(model, windows, dense))
        works.append(lambda model=model, windows=windows, dense=dense: evaluate(model, windows, dense))
    full, half = time_in_turns(*works, rounds=1)
    difference = abs(results[0].perplexity - results[1].perplexity) / results[0].standard_error
    rates = f"{windows.num_tokens / half:,.0f} / {windows.num_tokens / full:,.0f} tokens/s"
    return [
        (f"evaluation, bfloat16 / float32 ({rates})", f"{full / half:.1f} ×", "≥ 5 × (with AMX)"),
        ("perplexity difference, in standard errors", f"{difference:.3f}", "≤ 1"),
    ]


def compress() -> list[tuple[str, str, str]]:
    """`shoal compress smollm2-135m --num-replaced 6`, from the command to the saved and evaluated model."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["shoal", "compress", MODEL, "--num-replaced", "6", "--out", f"{folder}/model"]
        start = time.perf_counter()
        subprocess.run([shutil.which(command[0], path=str(Path(sys.executable).parent)), *command[1:]], check=True)
        seconds = time.perf_counter() - start
    return [("shoal compress, 6 blocks, no distillation", f"{seconds:.0f} s", "≤ 75 s")]


def trials() -> list[tuple[str, str, str]]:
    """A trial's wall time outside loading, fitting, distilling and evaluating: the smoke search, one trial at a time."""
    shoal = shutil.which("shoal", path=str(Path(sys.executable).parent))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([shoal, "search", "tune_configs/smoke.yaml", "--storage", folder, "--num-cpus", "1"], check=True)
        overheads = []
        for file in Path(folder).glob("smoke/trials/*/result.json"):
            seconds = json.loads(file.read_text())["point"]["seconds"]
            wall = file.stat().st_mtime - (file.parent / "assignment.json").stat().st_mtime
            overheads.append(wall - sum(seconds[stage] for stage in ("fit", "distil", "evaluate")))
    return [("a trial outside torch work (median)", f"{statistics.median(overheads):.1f} s", "≤ 8 s")]


def concurrency() -> list[tuple[str, str, str]]:
    """64 trials at once that report every ten seconds and do nothing else: what driver and tracker add to their time."""
    with tempfile.TemporaryDirectory() as folder:
        sweep = DummySweep(Path(folder), num_trials=64, num_reports=12, every_s=10.0)
        shares, cpu_s, unsent = measure_overhead(sweep, num_cpus=2)
    return [
        ("64 trials at once, time beyond their work (median)", f"{statistics.median(shares):.1%}", "≤ 5 %"),
        (f"64 trials at once, driver and tracker ({unsent} records late)", f"{cpu_s:.2f} CPU s per trial", ""),
    ]


def serving() -> list[tuple[str, str, str]]:
    """Whole answers of a token over Ray Serve and HTTP, one at a time, beside the engine called directly."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    limits = Limits(max_context=256)
    variant = {"model": "tiny-random", "dtype": "float32", "cpus_per_replica": 1}
    endpoint = Endpoint(ServeSettings.model_validate({"port": port, "variants": {"a": variant}, "limits": limits}))
    body = json.dumps({"model": "a", "prompt": "The sea", "max_tokens": 1, "temperature": 0}).encode()
    request = Generation(tuple(b"The sea"), 1, Sampling(temperature=0.0))

    def make_decoder() -> BatchedDecoder:
        torch.set_num_threads(1)
        return BatchedDecoder(load_model("tiny-random", dtype="float32"), max_batch_size=limits.max_batch_size)

    engine = Engine(make_decoder, load_tokenizer("tiny-random"), max_context=256)
    endpoint.start(lambda *_: None)
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def over_http() -> None:
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        assert json.load(connection.getresponse())["usage"]["completion_tokens"] == 1

    with asyncio.Runner() as runner:
        served, direct = time_in_turns(over_http, lambda: runner.run(engine.generate(request)), rounds=200)
    endpoint.stop()
    label = f"Serve and HTTP, a request of one token ({served * 1e3:.1f} ms) − engine alone ({direct * 1e3:.1f} ms), p50"
    return [(label, f"{(served - direct) * 1e3:.1f} ms", "≤ 5 ms")]


BENCHMARKS = {
    work.__name__: work for work in (calibrate, memory, linearity, dtypes, compress, trials, concurrency, serving)
}


def main(names: list[str]) -> None:
    table = Table(
        "what", "measured", "bound", title=f"{MODEL}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for name in names or BENCHMARKS:
        for row in BENCHMARKS[name]():
            table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
