"""`shoal finetune`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal_services.commands.options import (
    Address,
    AsJson,
    Dtype,
    Model,
    NumCpus,
    Revision,
    Tokens,
    TrackingUri,
    TrainText,
    Window,
    make_texts,
)

if TYPE_CHECKING:
    from rich.table import Table

    from shoal_services.finetuning.results import Finetuned


class TaskName(StrEnum):
    """What is learned."""

    classification = "classification"
    preference = "preference"


class TrainedName(StrEnum):
    """Which weights are trained."""

    all = "all"
    lora = "lora"


def finetune(
    model: Model,
    data: Annotated[str, typer.Option(help="Examples: Hub dataset, .jsonl or .parquet.")],
    task: Annotated[
        TaskName, typer.Option(help="Classes of texts, or which of two texts is better (`chosen`, `rejected`).")
    ] = TaskName.classification,
    text_column: Annotated[list[str], typer.Option(help="Column of the text; several become lines.")] = ["text"],  # noqa: B006
    label_column: Annotated[str, typer.Option(help="Column of the class.")] = "label",
    trained: Annotated[TrainedName, typer.Option(help="All weights, or LoRA in every projection.")] = TrainedName.all,
    num_seeds: Annotated[int, typer.Option(help="How often, each time with another seed: the spread is over these.")] = 3,
    learning_rate: Annotated[float | None, typer.Option(help="Peak; by default 2e-5, with LoRA 2e-4.")] = None,
    num_epochs: Annotated[float, typer.Option(help="Passes over the examples.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Examples per step, over all workers.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens of a text; of longer ones the end is kept.")] = 256,
    text: TrainText = ["wikipedia-sample"],  # noqa: B006
    calibration_tokens: Tokens = None,
    window: Window = 1024,
    dtype: Dtype = None,
    revision: Revision = None,
    name: Annotated[str | None, typer.Option(help="Folder in the storage; by default finetune-MODEL-DATA.")] = None,
    num_workers: Annotated[int, typer.Option(help="Ray Train workers per seed.")] = 1,
    cpus_per_worker: Annotated[float, typer.Option(help="CPUs of each.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs of each.")] = 0,
    address: Address = None,
    storage: Annotated[Path, typer.Option(help="Folder that all nodes share.")] = Path("shoal-runs"),
    tracking_uri: TrackingUri = None,
    num_cpus: NumCpus = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a decoder on classes or preferences, and measure what that does to its linearity.

    Every seed leaves a causal model; linearity before and after is measured on --text. Interrupted, the same command
    goes on.

    Examples:

        shoal finetune smollm2-135m --data reviews.jsonl

        shoal finetune gpt2 --data google/boolq --text-column question --text-column passage --label-column answer

        shoal finetune gpt2 --data Anthropic/hh-rlhf --task preference --trained lora --gpus-per-worker 1
    """
    from shoal_services.finetuning.config import FinetuneConfig

    rate = learning_rate or (2e-4 if trained is TrainedName.lora else 2e-5)
    settings = {
        "trained": trained.value, "learning_rate": rate, "num_epochs": num_epochs, "batch_size": batch_size,
        "max_length": max_length,
    }  # fmt: skip
    run = {
        "num_workers": num_workers, "cpus_per_worker": cpus_per_worker, "gpus_per_worker": gpus_per_worker,
        "address": address, "storage": storage, "tracking_uri": tracking_uri,
    }  # fmt: skip
    config = FinetuneConfig.model_validate(
        {
            "name": name or _make_name(model, data), "model": model, "revision": revision, "dtype": dtype, "data": data,
            "task": task.value, "text_columns": tuple(text_column), "label_column": label_column,
            "seeds": tuple(range(num_seeds)), "finetuning": settings, "run": run,
            "texts": make_texts(text, text, calibration_tokens=calibration_tokens, window=window),
        }
    )  # fmt: skip
    from shoal_services.commands.terminal import follow_trials, tell_delivery, tell_runs
    from shoal_services.console import say, show
    from shoal_services.finetuning.sweep import run_finetuning

    with follow_trials(config.folder / "trials") as display:
        outcome = run_finetuning(config, display, num_cpus=num_cpus)
    for result in outcome.results:
        if result.status != "finished":
            say(f"{result.key} {result.status}: {result.reason}")
    tell_delivery(outcome.delivery)
    if outcome.finetuned is None:
        raise typer.Exit(1)
    if as_json:
        print((outcome.folder / "finetuning.json").read_text())
    else:
        show(_make_table(outcome.finetuned))
    say(f"models:    {outcome.folder}/trials/seed-N/model\npage:      {outcome.folder / 'linearity.html'}")
    tell_runs(outcome.tracking_uri)


def _make_name(model: str, data: str) -> str:
    """`finetune-MODEL-DATA`, of the last parts of both."""
    from shoal_services.console import name_of

    return f"finetune-{name_of(model)}-" + Path(data).stem.replace(":", "-").replace("@", "-")


def _make_table(finetuned: Finetuned) -> Table:
    """Accuracy and mean linearity of each seed, and the change with its standard error over the seeds."""
    from rich.table import Table

    from shoal_services.finetuning.results import MEASURES, mean_over_blocks

    text = finetuned.text
    table = Table(
        title=f"{finetuned.config.model} fine-tuned on {finetuned.config.data}", caption_justify="left",
        caption=f"Linearity on {text.name}, {text.num_tokens:,} tokens, mean over blocks. Accuracy on held-out examples. "
        "Change: mean over seeds ± one standard error.",
    )  # fmt: skip
    for column in ("", "accuracy", "all tokens", "w/o residual", "held out", "held out, w/o residual"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("before", "", *(f"{mean_over_blocks(finetuned.before, field):.4f}" for field in MEASURES))
    for result in finetuned.results:
        accuracy = f"{result.accuracy:.1%} ± {result.accuracy_standard_error:.1%}"
        table.add_row(result.key, accuracy, *(f"{mean_over_blocks(result.scores(), field):.4f}" for field in MEASURES))
    table.add_row("change", "", *(finetuned.change(field).text(4, sign=True) for field in MEASURES))
    return table
