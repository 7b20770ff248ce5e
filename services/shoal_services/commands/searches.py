"""`shoal search` and `shoal frontier`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shoal_services.commands.options import Address, AsJson, NumCpus, TrackingUri


def search(
    config: Annotated[Path, typer.Argument(help="A search: a YAML file as in tune_configs/.")],
    address: Address = None,
    storage: Annotated[Path | None, typer.Option(help="Folder for all searches, instead of run.storage.")] = None,
    tracking_uri: TrackingUri = None,
    num_cpus: NumCpus = None,
    as_json: AsJson = False,
) -> None:
    """Search the size/quality frontier of a model on a Ray cluster.

    Interrupted at any time, the same command goes on where it stopped.

    Examples:

        shoal search tune_configs/demo.yaml

        shoal search tune_configs/curves-smollm2-135m.yaml   # a grid: also writes curves.html

        shoal search my.yaml --address auto --storage /mnt/shared --tracking-uri http://mlflow:5000
    """
    from shoal_services.search.config import load_config

    loaded = load_config(config).run_with(address=address, storage=storage, tracking_uri=tracking_uri)

    from shoal_services.commands.terminal import follow_trials
    from shoal_services.search.run import run_search

    with follow_trials(loaded.folder / "trials") as display:
        outcome = run_search(loaded, display, num_cpus=num_cpus)
    _print_outcome(loaded.name, outcome, as_json)


def _print_outcome(name: str, outcome, as_json: bool) -> None:
    from shoal_services.commands.terminal import tell_delivery, tell_runs
    from shoal_services.console import quote, say, show
    from shoal_services.pages.tables import frontier_table
    from shoal_services.search.run import describe_frontier

    if as_json:
        print(json.dumps(describe_frontier(outcome.frontier), indent=2))
    elif outcome.frontier:
        show(frontier_table(name, outcome.frontier))
    for result in outcome.results:
        if result.status != "finished":
            say(f"trial {result.key} {result.status}: {result.reason}")
    tell_delivery(outcome.delivery)
    folder = outcome.folder
    if not outcome.frontier:
        raise RuntimeError(outcome.explain_failure())
    say(f"frontier:  {folder / 'frontier.html'}\nlinearity: {folder / 'linearity.html'}")
    if (folder / "curves.html").exists():
        say(f"curves:    {folder / 'curves.html'}")
    say(f"compare:   {quote('shoal', 'frontier', _short(folder), '--prompt', 'The sea is')}")
    tell_runs(outcome.tracking_uri)


def frontier(
    folder: Annotated[Path, typer.Argument(help="A search's folder.")],
    prompt: Annotated[str | None, typer.Option(help="Continue this with the dense model and each point.")] = None,
    max_parameters: Annotated[int | None, typer.Option(help="Print the best point within this size only.")] = None,
    num_new: Annotated[int, typer.Option("--max-tokens", help="Tokens to continue a prompt by.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Show the frontier of a search, pick from it, and compare what its models write.

    Examples:

        shoal frontier shoal-runs/demo

        shoal frontier shoal-runs/demo --prompt "The history of the"

        shoal frontier shoal-runs/demo --max-parameters 120000000 --json
    """
    from shoal.frontier import find_best_within, find_frontier

    from shoal_services.console import say, show
    from shoal_services.pages.tables import frontier_table
    from shoal_services.search.folder import RunFolder

    run = RunFolder(folder.resolve())
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} is no search's folder: it has no config.json; give shoal-runs/NAME")
    points = find_frontier(run.find_points())
    if max_parameters is not None:
        points = [find_best_within(run.find_points(), max_parameters=max_parameters)]
    if as_json:
        print(json.dumps([json.loads(point.model_dump_json()) for point in points], indent=2))
        return
    show(frontier_table(folder.resolve().name, points))
    if prompt is not None:
        _compare_continuations(points, prompt, num_new)
    say(f"page:   {folder / 'frontier.html'}\nmodels: {folder / 'trials'}/KEY/model")


def _compare_continuations(points, prompt: str, num_new: int) -> None:
    from rich.text import Text
    from shoal.checkpoints.load import load_model, load_tokenizer
    from shoal.models.generate import continue_text

    from shoal_services.console import output

    base = points[0].recipe.base_model
    tokenizer = load_tokenizer(base, revision=points[0].recipe.revision)
    named = [("dense", base), *((f"{p.recipe.count_units()} {p.recipe.kind}", p.artefact) for p in reversed(points))]
    for name, place in named:
        text = continue_text(load_model(place), tokenizer, prompt, num_new=num_new)
        output.print(Text.assemble((f"{name:>12}", "bold"), f"  {prompt}", (text, "cyan")))


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
