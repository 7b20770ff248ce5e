"""`shoal plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal_services.commands.options import AsJson

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table
    from shoal.cost import ModelShape

    from shoal_services.search.plan import Plan


def plan(
    config: Annotated[Path, typer.Argument(help="A search: a YAML file as in tune_configs/.")],
    model_config: Annotated[
        str | None,
        typer.Option(
            help="Plan for this model instead: a config.json, folder, Hub id or alias; llama-2-7b, llama-3.1-8b, "
            "llama-3.1-70b and llama-3.1-405b need no network."
        ),
    ] = None,
    gpus: Annotated[list[int], typer.Option(help="Accelerators of the cluster; several are compared. Repeatable.")] = [8],  # noqa: B006
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200 or l40s.")] = "h100",
    price_per_gpu_hour: Annotated[float | None, typer.Option(help="What an hour of one costs, in any currency.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict memory, time, storage and cost of a search, for a model and a cluster that need not be here.

    Examples:

        shoal plan tune_configs/qwen3-8b.yaml --model-config llama-3.1-8b --gpus 8 --gpus 64 --gpus 512

        shoal plan my.yaml --model-config llama-3.1-405b --gpus 512 --gpu h200 --price-per-gpu-hour 4 --json
    """
    from shoal.cost import HARDWARE

    from shoal_services.console import show
    from shoal_services.search.config import load_config
    from shoal_services.search.plan import plan_search, read_shape

    if gpu not in HARDWARE:
        raise ValueError(f"--gpu {gpu!r} is not known; choose one of {', '.join(HARDWARE)}")
    search = load_config(config)
    name = model_config or search.model
    shape = read_shape(name, search.revision if model_config is None else None)
    plans = [
        plan_search(search, shape, HARDWARE[gpu], count, price_per_gpu_hour=price_per_gpu_hour)
        for count in sorted(set(gpus))
    ]
    if as_json:
        print(json.dumps({"model": name, "gpu": gpu, "plans": [one.as_dict() for one in plans]}, indent=2))
        return
    show(plan_table(search.name, name, gpu, shape, plans))


def plan_table(search: str, model: str, gpu: str, shape: ModelShape, plans: Sequence[Plan]) -> Table:
    """What a search would take, a column for each number of accelerators."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from shoal.cost import FORMULA_ERROR, HARDWARE

    from shoal_services.search.phases import STORAGE_BYTES_PER_S

    lowest, likely, highest = HARDWARE[gpu].efficiency
    reading = f", and a worker reads {STORAGE_BYTES_PER_S / 1e9:g} GB/s from storage" if plans[0].streamed else ""
    caption = (
        f"Estimates. It is assumed, and was not measured, that {likely:.0%} of the peak is reached, {lowest:.0%} to "
        f"{highest:.0%} in brackets{reading}. On a CPU the formulas are off by up to {FORMULA_ERROR:.0%} "
        "(tests/fit_cost.py)."
    )
    title = f"{search}: {model}, {shape.num_parameters / 1e9:.1f} billion parameters, on {gpu}"
    table = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for plan in plans:
        table.add_column(f"{plan.num_gpus}", justify="right")

    def add(label: str, show: Callable[[Plan], str]) -> None:
        table.add_row(label, *(show(plan) for plan in plans))

    add("workers per trial", lambda p: str(p.workers_per_trial))
    add("a trial fits on its workers", _say_whether_it_fits)
    add("memory per worker", lambda p: f"{p.memory_per_worker / 1e9:,.0f} GB")
    add("trials at once", lambda p: str(p.concurrent_trials))
    add("distillation, tokens/s a trial", lambda p: f"{p.tokens_per_second:,.0f}")
    add("sent per step and worker", lambda p: f"{p.communication_per_step / 1e9:,.2f} GB")
    add("prepare", lambda p: f"{p.prepare_seconds / 60:,.1f} min")
    add("a trial", lambda p: f"{p.trial_seconds / 60:,.1f} min")
    add("whole search", lambda p: f"{p.seconds / 3600:,.2f} h ({p.low_seconds / 3600:,.2f}–{p.high_seconds / 3600:,.2f})")
    add("storage", lambda p: f"{p.storage_bytes / 1e12:,.2f} TB")
    add("storage traffic", lambda p: f"{p.traffic_bytes / 1e12:,.2f} TB")
    if any(plan.cost is not None for plan in plans):
        add("cost", lambda p: f"{p.cost:,.0f}")
    return table


def _say_whether_it_fits(plan: Plan) -> str:
    if plan.fits:
        return "yes, streamed" if plan.streamed else "yes"
    if plan.workers_to_fit is None:
        return "no"
    return f"no: it takes {plan.workers_to_fit} workers" + ("" if plan.streamed else " and run.streamed")
