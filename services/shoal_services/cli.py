"""The `shoal` command. Heavy imports stand inside the commands: `shoal --help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from shoal_services.serving import commands

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False, add_completion=False,
    help="Makes transformer language models shallower: measure, replace, distil, search.\n\n"
    "Start with `shoal compress smollm2-135m --num-replaced 6`, or `shoal search tune_configs/demo.yaml`.",
)  # fmt: skip

Model = Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or a packaged alias: smollm2-135m, tiny-random.")]
TrainText = Annotated[
    list[str], typer.Option("--text", help="Text to fit and distil on: Hub dataset, .txt, .jsonl, .parquet. Repeatable.")
]
EvaluationText = Annotated[
    list[str], typer.Option(help="Text to evaluate on; other than --text, or shared out. Repeatable.")
]
Tokens = Annotated[int, typer.Option(help="Tokens to calibrate on; at least 9 per hidden dimension.")]
EvaluationTokens = Annotated[int, typer.Option(help="Tokens of each evaluation text.")]
Window = Annotated[int, typer.Option(help="Tokens per window in calibration and evaluation.")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; by default what the hardware is fast at.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of a table.")]


class KindName(StrEnum):
    """What stands in for a replaced block."""

    linear = "linear"
    low_rank = "low_rank"
    folded = "folded"
    dropped = "dropped"


class SelectionName(StrEnum):
    """How blocks are chosen."""

    linearity = "linearity"
    linearity_in_sample = "linearity_in_sample"
    linearity_without_residual = "linearity_without_residual"
    cosine = "cosine"
    window = "window"
    greedy_kl = "greedy_kl"


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    os.environ["SHOAL_DEBUG"] = "1" if debug else os.environ.get("SHOAL_DEBUG", "")


@app.command()
def profile(
    models: Annotated[list[str], typer.Argument(help="Hub ids, folders, .gguf files, or aliases; several are compared.")],
    text: TrainText = ["wikipedia-sample"],  # noqa: B006
    calibration_tokens: Tokens = 32_768,
    window: Window = 1024,
    dtype: Dtype = None,
    revision: Annotated[
        list[str], typer.Option(help="Branch, tag or commit of one Hub model; several are compared. Repeatable.")
    ] = [],  # noqa: B006
    page: Annotated[Path | None, typer.Option(help="Where to write the page; by default ./linearity-MODEL.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how linear every decoder block is, of one model or of several side by side.

    Examples:

        shoal profile smollm2-135m

        shoal profile HuggingFaceTB/SmolLM2-360M --text Salesforce/wikitext:wikitext-2-raw-v1@train --json

        shoal profile dense-folder finetuned-folder

        shoal profile EleutherAI/pythia-70m --revision step1000 --revision step10000 --revision step143000
    """
    from shoal.profile import profile_model

    from shoal_services.linearity_page import write_comparison_page, write_linearity_page
    from shoal_services.terminal import comparison_table, console, linearity_table, output, show_progress

    if len(models) > 1 and revision:
        raise ValueError("--revision chooses among the revisions of one model; name one model, or none of its revisions")
    texts = _make_texts(text, text, calibration_tokens=calibration_tokens, window=window)
    revisions: list[str | None] = [*revision] or [None]
    measured = []
    with show_progress() as listen:
        for model, one in product(models, revisions):

            def listen_for(stage: str, done: int, total: int, label: str = f"{model}@{one}" if one else model) -> None:
                listen(f"{stage}, {label}" if len(models) + len(revisions) > 2 else stage, done, total)

            measured.append(profile_model(model, texts, revision=one, dtype=dtype, listen=listen_for))
    first = measured[0]
    page = page or Path(f"linearity-{Path(models[0]).name}.html")
    if len(measured) == 1:
        write_linearity_page(page, first.model, first.scores, first)
    else:
        write_comparison_page(page, measured)
    if as_json:
        print(json.dumps(first.as_dict() if len(measured) == 1 else [one.as_dict() for one in measured], indent=2))
        return
    output.print(linearity_table(first.model, first.scores) if len(measured) == 1 else comparison_table(measured))
    console.print(f"page: {page}")


@app.command()
def compress(
    model: Model,
    num_replaced: Annotated[int | None, typer.Option("--num-replaced", "-n", help="How many blocks to replace.")] = None,
    blocks: Annotated[str | None, typer.Option(help="Which blocks, instead of how many: 12,13,15.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to make; by default MODEL-KIND-N.")] = None,
    kind: Annotated[KindName, typer.Option(help="linear, low_rank (with --rank), folded, dropped.")] = KindName.linear,
    rank: Annotated[int | None, typer.Option(help="Rank of the maps of kind low_rank.")] = None,
    selection: Annotated[SelectionName, typer.Option(help="How blocks are chosen.")] = SelectionName.linearity,
    distil_tokens: Annotated[int, typer.Option(help="Tokens to distil on; 0 fits in closed form only.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the distillation.")] = 5e-4,
    trained: Annotated[str, typer.Option(help="What distillation trains: maps, lora (and maps), all.")] = "lora",
    text: TrainText = ["wikipedia-sample"],  # noqa: B006
    evaluation_text: EvaluationText = ["wikipedia-sample"],  # noqa: B006
    calibration_tokens: Tokens = 32_768,
    evaluation_tokens: EvaluationTokens = 16_384,
    window: Window = 1024,
    dtype: Dtype = None,
    revision: Revision = None,
    seed: Annotated[int, typer.Option(help="Seed of the distillation.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make one shallower model: choose blocks, fit their replacements, distil, evaluate, store.

    Examples:

        shoal compress smollm2-135m --num-replaced 6

        shoal compress smollm2-135m -n 8 --kind folded --distil-tokens 131072 -o smol-22

        shoal compress ./my-llama --blocks 12,13,14 --text corpus.txt --evaluation-text held-out.txt
    """
    from shoal.compress import compress as run
    from shoal.recipe import Distillation, Recipe

    from shoal_services.terminal import console, output, point_table, show_progress

    listed = _parse_blocks(blocks)
    if (num_replaced is None) == (listed is None):
        raise ValueError("give either --num-replaced or --blocks")
    count = len(listed) if listed is not None else num_replaced or 0
    if count < 1:
        raise ValueError(f"--num-replaced {count}: choose 1 or more blocks to replace")
    recipe = Recipe.model_validate(
        {
            "base_model": model, "revision": revision, "num_replaced": count, "blocks": listed, "kind": kind.value,
            "rank": rank, "selection": "listed" if listed else selection.value, "seed": seed, "dtype": dtype,
            "distillation": Distillation.model_validate(
                {"num_tokens": distil_tokens, "learning_rate": learning_rate, "trained": trained}
            ) if distil_tokens else None,
        }
    )  # fmt: skip
    texts = _make_texts(
        text, evaluation_text, calibration_tokens=calibration_tokens, evaluation_tokens=evaluation_tokens, window=window
    )
    folder = out or Path(f"{Path(model).name}-{kind.value}-{count}")
    with show_progress() as listen:
        point = run(recipe, folder, texts=texts, listen=listen)
    if as_json:
        print(point.model_dump_json(indent=2))
        return
    output.print(point_table(point))
    console.print(f"model: {folder}   card: {folder / 'README.md'}   load: shoal.load({str(folder)!r})")


@app.command()
def search(
    config: Annotated[Path, typer.Argument(help="A search: a YAML file as in tune_configs/.")],
    address: Annotated[str | None, typer.Option(help="Ray cluster to use; by default a local one is started.")] = None,
    storage: Annotated[Path | None, typer.Option(help="Folder for all searches, instead of run.storage.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server, instead of SQLite in the search's folder.")
    ] = None,
    num_cpus: Annotated[int | None, typer.Option(help="CPUs of the local cluster; by default all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Search the size/quality frontier of a model on a Ray cluster.

    Interrupted at any time, the same command goes on where it stopped.

    Examples:

        shoal search tune_configs/demo.yaml

        shoal search my.yaml --address ray://head:10001 --storage /mnt/shared --tracking-uri http://mlflow:5000
    """
    from shoal_services.config import load_config

    loaded = load_config(config)
    given = {"address": address, "storage": storage, "tracking_uri": tracking_uri}
    run = loaded.run.model_copy(update={name: value for name, value in given.items() if value is not None})
    loaded = loaded.model_copy(update={"run": run})

    from shoal_services.search import run_search
    from shoal_services.terminal import console, show_progress, watch_trials

    try:
        with show_progress() as display, watch_trials(display, loaded.folder / "trials"):
            outcome = run_search(loaded, display, num_cpus=num_cpus)
    except KeyboardInterrupt as interrupt:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from interrupt
    _print_outcome(loaded.name, outcome, as_json)


def _print_outcome(name: str, outcome, as_json: bool) -> None:
    from shoal_services.terminal import console, frontier_table, output

    if as_json:
        print((outcome.folder / "frontier.json").read_text())
    else:
        output.print(frontier_table(name, outcome.frontier))
    for result in outcome.results:
        if result.status != "finished":
            console.print(f"trial {result.key} {result.status}: {result.reason}")
    if outcome.num_unsent:
        console.print(
            f"{outcome.num_unsent} records wait for the tracker ({outcome.tracking_problem}); "
            "give the same command again when it is up"
        )
    folder = outcome.folder
    console.print(f"frontier: {folder / 'frontier.html'}   linearity: {folder / 'linearity.html'}")
    console.print(f"compare:  shoal frontier {_short(folder)} --prompt 'The sea is'")
    console.print(f"runs:     mlflow ui --backend-store-uri {outcome.tracking_uri}")


@app.command()
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

    from shoal_services.folder import RunFolder
    from shoal_services.terminal import console, frontier_table, output

    run = RunFolder(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} is no search's folder: it has no config.json; give shoal-runs/NAME")
    points = find_frontier(run.find_points())
    if max_parameters is not None:
        points = [find_best_within(run.find_points(), max_parameters=max_parameters)]
    if as_json:
        print(json.dumps([json.loads(point.model_dump_json()) for point in points], indent=2))
        return
    output.print(frontier_table(folder.name, points))
    if prompt is not None:
        _compare_continuations(points, prompt, num_new)
    console.print(f"page: {folder / 'frontier.html'}   models: {folder / 'trials'}/KEY/model")


def _compare_continuations(points, prompt: str, num_new: int) -> None:
    from shoal.generate import continue_text
    from shoal.models import load_model, load_tokenizer

    from shoal_services.terminal import output

    base = points[0].recipe.base_model
    tokenizer = load_tokenizer(base, revision=points[0].recipe.revision)
    named = [("dense", base), *((f"{p.recipe.num_replaced} {p.recipe.kind}", p.artefact) for p in reversed(points))]
    for name, place in named:
        text = continue_text(load_model(place), tokenizer, prompt, num_new=num_new)
        output.print(f"[bold]{name:>12}[/bold]  {prompt}[cyan]{text}[/cyan]", soft_wrap=False)


@app.command()
def evaluate(
    model: Model,
    dense: Annotated[str | None, typer.Option(help="The dense model; by default that of the folder's recipe.")] = None,
    evaluation_text: EvaluationText = ["wikipedia-sample"],  # noqa: B006
    evaluation_tokens: EvaluationTokens = 16_384,
    window: Window = 1024,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a compressed model beside its dense model on the same tokens.

    Examples:

        shoal evaluate smollm2-135m-linear-6

        shoal evaluate ./my-model --dense ./my-dense --evaluation-text held-out.txt --json
    """
    from shoal.profile import evaluate_beside

    from shoal_services.terminal import evaluation_table, output, show_progress

    texts = _make_texts(evaluation_text, evaluation_text, evaluation_tokens=evaluation_tokens, window=window)
    with show_progress() as listen:
        evaluations = evaluate_beside(model, dense, texts, dtype=dtype, listen=listen)
    if as_json:
        print(json.dumps([json.loads(e.model_dump_json()) for e in evaluations], indent=2))
        return
    output.print(evaluation_table(model, evaluations))


@app.command()
def doctor(
    storage: Annotated[Path, typer.Option(help="Where searches would be kept.")] = Path("shoal-runs"),
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow server to look for.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to look at.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, hardware, storage, Ray, tracker, packaged model.

    Examples:

        shoal doctor

        shoal doctor --address ray://head:10001 --storage /mnt/shared --tracking-uri http://mlflow:5000
    """
    from shoal_services.doctor import examine
    from shoal_services.terminal import doctor_table, output

    checks = examine(storage=storage, tracking_uri=tracking_uri, address=address)
    if as_json:
        print(json.dumps([check.__dict__ for check in checks], indent=2))
    else:
        output.print(doctor_table(checks))
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


app.command()(commands.serve)
app.command()(commands.bench_serve)
app.add_typer(commands.keys, name="keys")


def _make_texts(train: list[str], evaluation: list[str], **sizes: int):
    from shoal.recipe import Texts

    return Texts.model_validate({"train": tuple(train), "evaluation": tuple(evaluation), **sizes})


def _parse_blocks(blocks: str | None) -> tuple[int, ...] | None:
    if blocks is None:
        return None
    try:
        return tuple(int(block) for block in blocks.split(","))
    except ValueError as error:
        raise ValueError(f"--blocks {blocks!r} is no list of numbers such as 12,13,15") from error


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> None:
    """Runs the command; errors become one message and an exit code of 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("SHOAL_DEBUG"):
            raise
        print(f"shoal: {_explain(error)}", file=sys.stderr)
        sys.exit(1)


def _explain(error: Exception) -> str:
    """What went wrong, on one screen."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        lines = []
        for complaint in error.errors():
            key = ".".join(str(part) for part in complaint["loc"])
            lines.append(f"{key}: " * bool(key) + complaint["msg"].removeprefix("Value error, "))
        return "\n".join(lines)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return "\n".join((str(error) or type(error).__name__).splitlines()[:20])
