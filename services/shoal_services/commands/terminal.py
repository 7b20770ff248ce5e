"""What a person sees in the terminal while something runs: bars with the time that is left, or lines in a log."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from shoal.linearity.scores import BlockLinearity

from shoal_services.console import console, mask_passwords, quote, say, show
from shoal_services.interrupts import Interrupted, interruptible
from shoal_services.pages.tables import linearity_table
from shoal_services.search.folder import TrialResult
from shoal_services.training.progress_file import read_progress

if TYPE_CHECKING:
    from shoal_services.pretraining.results import PretrainResult
    from shoal_services.tracking.tracker import Delivery

LINE_EVERY_S = 30.0
# What a line of the display takes beside its bar, its label and its note.
NUMBERS_WIDTH = 42


class ProgressDisplay:
    """A listener (stage, done, total) that draws one bar a stage, with the time that is left.

    Into a file or a job's log go lines instead: at a stage's begin and end, and every half minute.
    """

    def __init__(self) -> None:
        # Numbers are never cut: what is too much for the width goes off the bar, the note and the label.
        spare = max(0, console.width - NUMBERS_WIDTH)
        label_width, bar_width = min(28, max(12, spare - 8)), min(30, max(4, spare - 30))
        note_width = max(1, spare - label_width - bar_width)
        self.progress = Progress(
            _text_column("{task.description}", label_width), BarColumn(bar_width), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            _text_column("{task.fields[note]}", note_width, style="dim"), console=console, disable=not console.is_terminal,
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
            say(line)

    def remark(self, text: str) -> None:
        """A line above the bars."""
        say(text)

    def show_linearity(self, model: str, scores: Sequence[BlockLinearity]) -> None:
        """The table of linearity, above the bars."""
        show(linearity_table(model, scores), to=console)

    def show_trial(self, result: TrialResult) -> None:
        """One line for a trial that has ended, above the bars, and one for each of its faults."""
        for fault in result.faults:
            say(f"trial {result.key}: workers were started again: {fault}")
        point = result.point
        if point is None:
            say(f"trial {result.key} {result.status}: {result.reason}")
            return
        first, recipe = point.evaluations[0], point.recipe
        distilled = f"{recipe.distillation.num_tokens:,} tokens distilled" if recipe.distillation else "not distilled"
        say(
            f"trial {result.key}: {recipe.changes}, {distilled}: "
            f"{point.num_parameters / 1e6:.1f} M, "
            f"perplexity {first.perplexity:.2f} ± {first.standard_error:.2f} (dense {first.dense_perplexity:.2f})"
        )

    def show_run(self, result: PretrainResult) -> None:
        """One line for a pretraining run that has ended, above the bars."""
        name = f"run {result.key}: {result.regularizer.label}, seed {result.assignment['seed']}"
        if result.status != "finished":
            say(f"{name}: {result.status}: {result.reason}")
            return
        last = result.checks[-1]
        say(
            f"{name}: perplexity {last['validation_perplexity']:.2f}, mean linearity {last['mean_held_out']:.4f}, "
            f"without residual {last['mean_held_out_without_residual']:.4f} (held out)"
        )

    def note(self, stage: str, text: str) -> None:
        """A remark behind a bar."""
        if stage in self.tasks:
            self.progress.update(self.tasks[stage], note=text)


def _text_column(form: str, width: int, *, style: str = "none") -> TextColumn:
    column = Column(no_wrap=True, overflow="ellipsis", min_width=width, max_width=width)
    return TextColumn(form, style=style, markup=False, table_column=column)


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
    """Bars and what each running trial is doing, while the block runs; a signal ends it with a shell's exit code for it."""
    try:
        with interruptible(), show_progress() as display, watch_trials(display, trials):
            yield display
    except KeyboardInterrupt as interrupt:
        say("stopped; the same command goes on from here")
        raise typer.Exit(interrupt.exit_code if isinstance(interrupt, Interrupted) else 130) from interrupt


def tell_delivery(delivery: Delivery) -> None:
    """Says which records have not reached the tracker, and what to do."""
    for complaint in delivery.complaints():
        say(complaint)


def tell_runs(tracking_uri: str) -> None:
    """How to see the runs: an MLflow server by its address, a database by a command."""
    is_server = tracking_uri.startswith("http")
    say(
        "runs:      "
        + (tracking_uri if is_server else quote("mlflow", "ui", "--backend-store-uri", mask_passwords(tracking_uri)))
    )
