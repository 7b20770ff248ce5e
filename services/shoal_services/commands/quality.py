"""`shoal probe`, `shoal judge` and `shoal splice`: what a model knows, what its stories and its blocks are worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal_services.commands.options import (
    AsJson,
    Dtype,
    EvaluationText,
    EvaluationTokens,
    Model,
    Revision,
    Tokens,
    TrainText,
    Window,
    make_texts,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table
    from shoal.paper.probe import Probe
    from shoal.paper.splice import Worth

    from shoal_services.judge import CriterionGrade


def probe(
    models: Annotated[list[str], typer.Argument(help="Hub ids, folders, .gguf files, or aliases; shown side by side.")],
    data: Annotated[
        str, typer.Option(help="Labelled texts: .jsonl, .parquet or Hub dataset with the columns text and label.")
    ],
    window: Annotated[int, typer.Option(min=1, help="Tokens of each text at most.")] = 256,
    folds: Annotated[int, typer.Option(min=2, help="Folds of the cross-validation.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the folds.")] = 0,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well a linear probe reads a label off the embeddings after each block, of one model or of several.

    Examples:

        shoal probe smollm2-135m --data labelled.jsonl

        shoal probe smollm2-135m smollm2-135m-linear-6 --data labelled.jsonl --json
    """
    from shoal.paper.probe import load_probe_texts, probe_model

    from shoal_services.commands.terminal import show_progress
    from shoal_services.console import show

    labelled = load_probe_texts(data)
    labelled.require(folds)
    with show_progress() as listen:
        probes = [
            probe_model(model, labelled, window=window, num_folds=folds, seed=seed, dtype=dtype, listen=listen)
            for model in models
        ]
    if as_json:
        print(json.dumps([one.as_dict() for one in probes], indent=2))
        return
    show(probe_table(probes))


def judge(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or alias.")],
    url: Annotated[str, typer.Option(help="Base URL of an OpenAI-compatible endpoint: https://…/v1.")],
    judge: Annotated[str, typer.Option(help="The model there that grades.")],
    dense: Annotated[str | None, typer.Option(help="The dense model; by default that of the folder's recipe.")] = None,
    beginnings: Annotated[
        Path | None, typer.Option(help="Beginnings of stories, a line each; by default ten that come with Shoal.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Stories for each beginning.")] = 3,
    num_new: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of each story.")] = 200,
    temperature: Annotated[float, typer.Option(help="Temperature of the stories.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the stories.")] = 0,
    dtype: Dtype = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File of the stories; by default MODEL-stories.json.")
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="SHOAL_API_KEY", help="API key of the endpoint.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let a judge grade the grammar, creativity, consistency and plot of a model's stories, beside the dense model's.

    The protocol of TinyStories (arXiv 2305.07759). Stories and grades are kept: the same command goes on where it
    stopped.

    Examples:

        shoal judge smollm2-135m-linear-6 --url https://api.openai.com/v1 --judge gpt-4o

        shoal judge ./my-model --dense ./my-dense --url http://127.0.0.1:8000/v1 --judge large --beginnings begin.txt
    """
    from shoal_services.commands.terminal import show_progress
    from shoal_services.console import name_of, say, show
    from shoal_services.judge import Judge, Writing, read_beginnings, run_judge

    writing = Writing(
        model=model, dense=dense, beginnings=read_beginnings(beginnings), num_samples=samples, num_new=num_new,
        temperature=temperature, seed=seed, dtype=dtype,
    )  # fmt: skip
    file = out or Path(f"{name_of(model)}-stories.json")
    with show_progress() as listen:
        grades = run_judge(writing, Judge(url=url, model=judge, key=key), file, listen)
    if as_json:
        print(json.dumps([grade.model_dump() for grade in grades], indent=2))
        return
    show(grade_table(model, judge, grades))
    say(f"stories: {file}")


def splice(
    model: Model,
    text: TrainText = ["wikipedia-sample"],  # noqa: B006
    evaluation_text: EvaluationText = ["wikipedia-sample"],  # noqa: B006
    calibration_tokens: Tokens = None,
    evaluation_tokens: EvaluationTokens = 4_096,
    window: Window = 1024,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Measure what each block is worth: the loss without it, and with its best affine map in its place.

    Examples:

        shoal splice smollm2-135m

        shoal splice ./my-llama --text corpus.txt --evaluation-text held-out.txt --json
    """
    from shoal.paper.splice import find_worth

    from shoal_services.commands.terminal import show_progress
    from shoal_services.console import show

    texts = make_texts(
        text, evaluation_text, calibration_tokens=calibration_tokens, evaluation_tokens=evaluation_tokens, window=window
    )
    with show_progress() as listen:
        worth = find_worth(model, texts, revision=revision, dtype=dtype, listen=listen)
    if as_json:
        print(json.dumps(worth.as_dict(), indent=2))
        return
    show(splice_table(worth))


def probe_table(probes: Sequence[Probe]) -> Table:
    """The accuracy of the probes after each block of the dense model, a column for each model."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    first = probes[0]
    caption = (
        f"Accuracy on {first.text}, {first.num_examples:,} texts of {first.num_classes} classes, cross-validated over "
        f"{first.num_folds} folds, ± one standard error over texts. Naming the largest class: {first.majority:.3f}."
    )
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("blocks passed", justify="right")
    for probe in probes:
        table.add_column(probe.model, justify="right", overflow="fold")
    for passed in sorted({layer.num_passed for probe in probes for layer in probe.layers}):
        found = [next((layer for layer in probe.layers if layer.num_passed == passed), None) for probe in probes]
        cells = (f"{layer.accuracy:.3f} ± {layer.standard_error:.3f}" if layer else "" for layer in found)
        table.add_row(str(passed), *cells)
    return table


def grade_table(name: str, judge: str, grades: Sequence[CriterionGrade]) -> Table:
    """A judge's grades of a model's stories beside those of the dense model's."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    caption = f"Grades from 1 to 10 by {judge}, {grades[0].num_stories} stories, ± one standard error over beginnings."
    table = Table(title=name, caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "dense", "graded", "difference"):
        table.add_column(column, justify="right" if column else "left")
    for grade in grades:
        dense = difference = ""
        if grade.dense_mean is not None:
            dense = f"{grade.dense_mean:.2f} ± {grade.dense_standard_error:.2f}"
            difference = f"{grade.mean - grade.dense_mean:+.2f} ± {grade.difference_standard_error:.2f}"
        table.add_row(grade.criterion, dense, f"{grade.mean:.2f} ± {grade.standard_error:.2f}", difference)
    return table


def splice_table(worth: Worth) -> Table:
    """What each block of a model is worth, beside its linearity and its size."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    orders = {
        name: ", ".join(f"{worth.correlate(field, cost):+.2f} ({cost})" for cost in ("removed", "mapped"))
        for name, field in (("held-out linearity", "held_out"), ("norm ratio", "norm_ratio"))
    }
    caption = (
        f"How much the loss on {worth.text.name}, {worth.text.num_tokens:,} tokens, rises: nats per token ± one standard "
        "error over windows, paired. Rank correlation over the blocks with "
        + "; with ".join(f"{name}: {found}" for name, found in orders.items())
    )
    table = Table(title=worth.model, caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("block", "held out", "norm ratio", "removed", "its map instead"):
        table.add_column(column, justify="right")
    for score, one in zip(worth.scores, worth.splices, strict=True):
        table.add_row(
            str(one.block), f"{score.held_out:.4f}", f"{score.norm_ratio:.4f}",
            f"{one.removed:.3f} ± {one.removed_standard_error:.3f}", f"{one.mapped:.3f} ± {one.mapped_standard_error:.3f}",
        )  # fmt: skip
    return table
