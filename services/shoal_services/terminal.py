"""What a person sees in the terminal: progress with time left, tables, and errors of one screen."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from shoal.cost import FORMULA_ERROR, HARDWARE, Shape
from shoal.frontier import name_picks
from shoal.linearity import RANKING_REASON, BlockLinearity
from shoal.pretrain_recipe import Regularizer
from shoal.profile import Profile
from shoal.recipe import Evaluation, Point, Recipe, TaskScore

from shoal_services.doctor import Check
from shoal_services.folder import TrialResult, read_progress
from shoal_services.plan import Plan
from shoal_services.pretraining.results import PretrainResult, compare, describe_texts, estimate, group_runs

if TYPE_CHECKING:
    from shoal.probe import Probe

    from shoal_services.judge import CriterionGrade

LINE_EVERY_S = 30.0
console = Console(stderr=True, highlight=False)
output = Console(highlight=False)


class ProgressDisplay:
    """A listener (stage, done, total) that draws one bar a stage, with the time that is left.

    Into a file or a job's log go lines instead: at a stage's begin and end, and every half minute.
    """

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<28}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}", style="dim"), console=console,
            disable=not console.is_terminal,
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}
        self.said, self.said_at = "", -math.inf

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=total, note="")
            self.said_at = -math.inf
        self.progress.update(self.tasks[stage], completed=done, total=total)
        if not console.is_terminal:
            self._say(f"{stage} {done}/{total}", at_once=done >= total)

    def _say(self, line: str, *, at_once: bool) -> None:
        if line != self.said and (at_once or time.monotonic() - self.said_at > LINE_EVERY_S):
            self.said, self.said_at = line, time.monotonic()
            console.print(line)

    def remark(self, text: str) -> None:
        """A line above the bars."""
        self.progress.console.print(text)

    def show_linearity(self, model: str, scores: Sequence[BlockLinearity]) -> None:
        """The table of linearity, above the bars."""
        self.progress.console.print(linearity_table(model, scores))

    def show_trial(self, result: TrialResult) -> None:
        """One line for a trial that has ended, above the bars."""
        point = result.point
        if point is None:
            self.progress.console.print(f"trial {result.key} {result.status}: {result.reason}")
            return
        first, recipe = point.evaluations[0], point.recipe
        distilled = f"{recipe.distillation.num_tokens:,} tokens distilled" if recipe.distillation else "not distilled"
        self.progress.console.print(
            f"trial {result.key}: {recipe.changes}, {distilled}: "
            f"{point.num_parameters / 1e6:.1f} M, "
            f"perplexity {first.perplexity:.2f} ± {first.standard_error:.2f} (dense {first.dense_perplexity:.2f})"
        )

    def show_run(self, result: PretrainResult) -> None:
        """One line for a pretraining run that has ended, above the bars."""
        name = f"run {result.key}: {result.regularizer.label}, seed {result.assignment['seed']}"
        if result.status != "finished":
            self.progress.console.print(f"{name}: {result.status}: {result.reason}")
            return
        last = result.checks[-1]
        self.progress.console.print(
            f"{name}: perplexity {last['validation_perplexity']:.2f}, mean linearity {last['mean_held_out']:.4f}, "
            f"without residual {last['mean_held_out_without_residual']:.4f} (held out)"
        )

    def note(self, stage: str, text: str) -> None:
        """A remark behind a bar."""
        if stage in self.tasks:
            self.progress.update(self.tasks[stage], note=text)


@contextmanager
def show_progress() -> Iterator[ProgressDisplay]:
    """Bars while the block runs; where the error output is no terminal, lines."""
    display = ProgressDisplay()
    with display.progress:
        yield display


@contextmanager
def watch_trials(display: ProgressDisplay, trials: Path) -> Iterator[None]:
    """Behind the bar of trials, what each running trial is doing."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(1.0):
            running = []
            for file in sorted(trials.glob("*/progress.json")):
                progress = read_progress(file)
                if progress and not (file.parent / "result.json").exists():
                    stage, done, total = progress
                    running.append(f"{stage} {done}/{total}")
            display.note("trials", " · ".join(running))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def follow_trials(trials: Path) -> Iterator[ProgressDisplay]:
    """Bars and what each running trial is doing, while the block runs; Ctrl-C ends it with exit code 130."""
    try:
        with show_progress() as display, watch_trials(display, trials):
            yield display
    except KeyboardInterrupt as interrupt:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from interrupt


def tell_unsent(num_unsent: int, problem: str | None) -> None:
    """Says how many records wait for a tracker that did not answer."""
    if num_unsent:
        console.print(f"{num_unsent} records wait for the tracker ({problem}); give the same command again when it is up")


def comparison_table(profiles: Sequence[Profile]) -> Table:
    """Mean scores of several models, and their difference to the first."""
    caption = "Means over the blocks. Scores of arXiv 2405.12250, in sample; in brackets the difference to the first."
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("model", "blocks", "with residual", "without residual", "held out", "cosine", "norm ratio"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for profile in profiles:
        cells = [
            f"{profile.mean(field):.4f}"
            for field in ("score", "score_without_residual", "held_out", "cosine", "norm_ratio")
        ]
        for index, field in enumerate(("score", "score_without_residual")):
            cells[index] += f" ({profile.mean(field) - profiles[0].mean(field):+.4f})"
        table.add_row(profile.model, str(len(profile.scores)), *cells)
    return table


def linearity_table(name: str, scores: Sequence[BlockLinearity]) -> Table:
    """The blocks of a model with their scores; the most linear third stands out."""
    caption = f"Ranked by “held out”: {RANKING_REASON}. Bold: the most linear third."
    table = Table(
        title=f"Linearity of {name}",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in ("block", "held out", "all tokens", "w/o residual", "identity", "cosine", "norm ratio", "note"):
        table.add_column(column, justify="left" if column == "note" else "right")
    linear = sorted(scores, key=lambda s: -s.held_out)[: len(scores) // 3]
    for score in scores:
        note = "moves sinks: stays" if score.moves_sinks else ""
        if score.held_out <= score.identity:
            note = note or "no map beats the identity"
        numbers = (
            score.held_out,
            score.score,
            score.score_without_residual,
            score.identity,
            score.cosine,
            score.norm_ratio,
        )
        table.add_row(str(score.block), *(f"{x:.4f}" for x in numbers), note, style="bold" if score in linear else None)
    return table


def frontier_table(name: str, frontier: Sequence[Point]) -> Table:
    """The frontier below the dense model."""
    table = Table(
        title=f"Frontier of {name}",
        caption=_caption(frontier),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in ("", "−", "kind", "params", "MB", "perplexity", "× dense", "KL", "decode"):
        table.add_column(column, justify="left" if column in ("", "kind") else "right", no_wrap=True)
    if not frontier:
        return table
    dense, first = frontier[0], frontier[0].evaluations[0]
    table.add_row(
        "dense", "0", "", f"{dense.dense_size.num_parameters / 1e6:.1f}M", f"{dense.dense_size.num_bytes / 1e6:.0f}",
        f"{first.dense_perplexity:.2f} ± {first.dense_standard_error:.2f}", "1", "0", "×1",
    )  # fmt: skip
    names: dict[int, str] = {}
    for pick, point in name_picks(frontier).items():
        names[id(point)] = " ".join(filter(None, (names.get(id(point)), pick)))
    for point in reversed(frontier):
        table.add_row(names.get(id(point), ""), *frontier_cells(point))
    return table


def frontier_cells(point: Point) -> list[str]:
    """A point's row, but for its name."""
    first, recipe = point.evaluations[0], point.recipe
    speedup = ""
    if point.speed and point.dense_speed:
        speedup = f"×{point.speed.decode_tokens_per_s / point.dense_speed.decode_tokens_per_s:.2f}"
    return [
        str(recipe.num_replaced),
        describe_method(recipe),
        f"{point.num_parameters / 1e6:.1f}M",
        f"{point.size.num_bytes / 1e6:.0f}",
        f"{first.perplexity:.2f} ± {first.standard_error:.2f}",
        f"{math.exp(first.log_ratio):.2f} ± {math.exp(first.log_ratio) * first.log_ratio_standard_error:.2f}",
        f"{first.kl:.3f}",
        speedup,
    ]


def describe_method(recipe: Recipe) -> str:
    """The kind of replacement, and what was done to the weights of the blocks that stay."""
    kind = recipe.kind + (f"({recipe.rank})" if recipe.rank else "")
    return ", ".join([*([kind] if recipe.num_replaced else []), *recipe.weight_changes])


def _caption(frontier: Sequence[Point]) -> str:
    if not frontier:
        return "No trial has finished yet."
    point = frontier[0]
    text = point.evaluations[0].text
    return (
        "−: blocks replaced. Params without the zeros of sparse weights, MB with them, as saved. "
        f"Perplexity on {text.name}, {text.num_tokens:,} tokens, "
        f"{point.recipe.dtype} on {point.device}; "
        "± one standard error over windows (of × dense: paired). KL to dense in nats per token."
    )


def point_table(point: Point) -> Table:
    """One compressed model beside the dense one."""
    table = Table(title=f"{point.recipe.base_model}, {point.recipe.changes}")
    for column in ("", "dense", "compressed"):
        table.add_column(column, justify="left" if not column else "right")
    for e in point.evaluations:
        dense = f"{e.dense_perplexity:.2f} ± {e.dense_standard_error:.2f}"
        table.add_row(
            f"perplexity, {e.text.name} ({e.text.num_tokens:,})", dense, f"{e.perplexity:.2f} ± {e.standard_error:.2f}"
        )
        table.add_row("KL to dense, nats per token", "0", f"{e.kl:.4f} ± {e.kl_standard_error:.4f}")
        table.add_row("same top token", "100 %", f"{e.top1_agreement:.1%}")
    table.add_row("parameters", f"{point.dense_size.num_parameters:,}", f"{point.size.num_parameters:,}")
    table.add_row("weights, bytes", f"{point.dense_size.num_bytes:,}", f"{point.size.num_bytes:,}")
    if point.size.num_bitmask_bytes is not None:
        table.add_row(
            "bytes, if zeros were a bit each", f"{point.dense_size.num_bytes:,}", f"{point.size.num_bitmask_bytes:,}"
        )
    table.add_row(
        "KV cache, bytes per token", f"{point.dense_size.kv_bytes_per_token:,}", f"{point.size.kv_bytes_per_token:,}"
    )
    if point.speed and point.dense_speed:
        for label, field in (("prefill, tokens/s", "prefill_tokens_per_s"), ("decode, tokens/s", "decode_tokens_per_s")):
            table.add_row(label, f"{getattr(point.dense_speed, field):,.1f}", f"{getattr(point.speed, field):,.1f}")
    table.add_row("blocks replaced", "", " ".join(map(str, point.recipe.blocks or ())))
    return table


def evaluation_table(name: str, evaluations: Sequence[Evaluation]) -> Table:
    """A model's quality on each text beside the dense model's."""
    table = Table(title=name, caption="± one standard error over windows (of the ratio: paired).", caption_justify="left")
    for column in ("text", "tokens", "dense perplexity", "perplexity", "× dense", "KL", "same top token"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for e in evaluations:
        ratio = math.exp(e.log_ratio)
        table.add_row(
            e.text.name, f"{e.text.num_tokens:,}", f"{e.dense_perplexity:.2f} ± {e.dense_standard_error:.2f}",
            f"{e.perplexity:.2f} ± {e.standard_error:.2f}", f"{ratio:.3f} ± {ratio * e.log_ratio_standard_error:.3f}",
            f"{e.kl:.4f} ± {e.kl_standard_error:.4f}", f"{e.top1_agreement:.1%}",
        )  # fmt: skip
    return table


def plan_table(search: str, model: str, gpu: str, shape: Shape, plans: Sequence[Plan]) -> Table:
    """What a search would take, a column for each number of accelerators."""
    source = "fitted on measurements" if HARDWARE[gpu].measured else "an assumption, not measured by this project"
    lowest, likely, highest = HARDWARE[gpu].efficiency
    caption = (
        f"Estimates. The share of peak that is reached is {source}: {likely:.0%}, likely {lowest:.0%} to {highest:.0%}; "
        f"that range is in brackets. On a CPU the formulas are off by up to {FORMULA_ERROR:.0%} (tests/fit_cost.py)."
    )
    title = f"{search}: {model}, {shape.num_parameters / 1e9:.1f} billion parameters, on {gpu}"
    table = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for plan in plans:
        table.add_column(f"{plan.num_gpus}", justify="right")

    def add(label: str, show: Callable[[Plan], str]) -> None:
        table.add_row(label, *(show(plan) for plan in plans))

    add("workers per trial", lambda p: str(p.workers_per_trial))
    add("a trial fits on its workers", lambda p: "yes" if p.fits else f"no: it takes the memory of {p.shards}")
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


def task_table(name: str, scores: Sequence[TaskScore]) -> Table:
    """A model's scores in tasks beside the dense model's."""
    caption = "± one standard error over examples (of the difference: paired)."
    table = Table(title=name, caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("task", "metric", "examples", "dense", "score", "difference"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", overflow="fold")

    def write(value: float | None, error: float | None, form: str = ".3f") -> str:
        return "" if value is None else f"{value:{form}}" + ("" if error is None else f" ± {error:.3f}")

    for score in scores:
        table.add_row(
            score.task, score.metric, f"{score.num_examples:,}", write(score.dense_score, score.dense_standard_error),
            write(score.score, score.standard_error), write(score.difference, score.difference_standard_error, "+.3f"),
        )  # fmt: skip
    return table


def probe_table(probes: Sequence[Probe]) -> Table:
    """The accuracy of the probes after each block of the dense model, a column for each model."""
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


def doctor_table(checks: Sequence[Check]) -> Table:
    """What was checked, what was found, and what to do where it is wrong."""
    table = Table(show_header=False)
    for check in checks:
        mark = "[green]ok[/green]" if check.passed else "[red]no[/red]"
        table.add_row(
            mark, check.name, check.finding + (f"\n→ {check.remedy}" if check.remedy and not check.passed else "")
        )
    return table


def pretraining_table(name: str, results: Sequence[PretrainResult]) -> Table:
    """The regularisers of a sweep: perplexity and mean linearity, and in brackets the difference to λ = 0."""
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
