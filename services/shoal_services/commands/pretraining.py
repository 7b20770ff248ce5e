"""`shoal pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal_services.commands.options import Address, AsJson, NumCpus, TrackingUri

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from shoal_services.pretraining.results import PretrainResult


def pretrain(
    config: Annotated[Path, typer.Argument(help="A sweep: a YAML file as tune_configs/pretrain-tiny.yaml.")],
    address: Address = None,
    storage: Annotated[Path | None, typer.Option(help="Folder for all sweeps, instead of run.storage.")] = None,
    tracking_uri: TrackingUri = None,
    num_cpus: NumCpus = None,
    as_json: AsJson = False,
) -> None:
    """Pretrain a model from nothing with the cosine or MSE regulariser, over several weights λ and seeds.

    Interrupted at any time, the same command goes on where it stopped.

    Examples:

        shoal pretrain tune_configs/pretrain-tiny.yaml

        shoal pretrain tune_configs/pretrain-mistral-150m.yaml --address auto --storage /mnt/shared
    """
    from shoal_services.pretraining.config import load_pretrain_config

    loaded = load_pretrain_config(config)
    run = loaded.run.given(address=address, storage=storage, tracking_uri=tracking_uri)
    loaded = loaded.model_copy(update={"run": run})

    from shoal_services.commands.terminal import follow_trials
    from shoal_services.pretraining.sweep import run_pretraining

    with follow_trials(loaded.folder / "trials") as display:
        outcome = run_pretraining(loaded, display, num_cpus=num_cpus)
    _print_outcome(loaded.name, outcome, as_json)


def _print_outcome(name: str, outcome, as_json: bool) -> None:
    from shoal_services.commands.terminal import tell_delivery, tell_runs
    from shoal_services.console import quote, say, show

    finished = [result for result in outcome.results if result.status == "finished"]
    if as_json:
        print((outcome.folder / "pretraining.json").read_text())
    elif finished:
        show(pretraining_table(name, finished))
    for result in outcome.results:
        if result.status != "finished":
            say(f"run {result.key} {result.status}: {result.reason}")
    tell_delivery(outcome.delivery)
    say(f"page:      {outcome.folder / 'pretraining.html'}")
    tell_runs(outcome.tracking_uri)
    if not finished:
        raise typer.Exit(1)
    say(f"look at:   {quote('shoal', 'profile', finished[0].model)}")


def pretraining_table(name: str, results: Sequence[PretrainResult]) -> Table:
    """The regularisers of a sweep: perplexity and mean linearity, and in brackets the difference to λ = 0."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from shoal.paper.pretrain_recipe import Regularizer

    from shoal_services.pretraining.results import compare, describe_texts, estimate, group_runs

    caption = (
        f"Linearity: mean over the blocks, held out. ± one standard error over seeds; the second line is the difference to "
        f"λ = 0, taken seed by seed. {describe_texts(results)}"
    )
    table = Table(title=name, caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("regulariser", "seeds", "perplexity", "linearity", "without residual"):
        table.add_column(column, justify="left" if column == "regulariser" else "right")
    groups = group_runs(results)
    for one, runs in groups.items():
        cells = []
        for field, digits in (("validation_perplexity", 2), ("mean_held_out", 4), ("mean_held_out_without_residual", 4)):
            difference = compare(runs, groups.get(Regularizer(), []), field) if one.weight else None
            second = f"\n{difference.text(digits, sign=True)}" if difference else ""
            cells.append(estimate(runs, field).text(digits) + second)
        table.add_row(one.label, str(len(runs)), *cells)
    return table
