"""`shoal plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shoal_services.commands.options import AsJson


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

    from shoal_services.config import load_config
    from shoal_services.plan import plan_search, read_shape
    from shoal_services.terminal import output, plan_table

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
    output.print(plan_table(search.name, name, gpu, shape, plans))
