"""The `shoal` command: what it is made of, and how errors end it."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Annotated

import typer

from shoal_services.commands import (
    evaluation,
    finetuning,
    jobs,
    kubernetes,
    machine,
    models,
    planning,
    pretraining,
    promotion,
    quality,
    searches,
    serving,
)  # fmt: skip

# Raised with a text for the user; of others, the kind says more than the text.
TOLD_ERRORS = (ValueError, OSError, RuntimeError, ImportError)
MAX_LINES, MAX_LINE = 15, 1200

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False, add_completion=False,
    help="Makes transformer language models shallower: measure, replace, distil, search.\n\n"
    "Start with `shoal compress smollm2-135m --num-replaced 6`, or `shoal search tune_configs/demo.yaml`.",
)  # fmt: skip


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    os.environ["SHOAL_DEBUG"] = "1" if debug else os.environ.get("SHOAL_DEBUG", "")


for command in (
    models.profile, models.compress, evaluation.evaluate, searches.search, searches.frontier,
    quality.probe, quality.judge, quality.splice, finetuning.finetune, pretraining.pretrain,
    planning.plan, jobs.submit, jobs.jobs, jobs.logs, jobs.stop, machine.doctor,
    serving.serve, serving.bench_serve, promotion.promote,
):  # fmt: skip
    app.command()(command)
app.add_typer(serving.keys, name="keys")
app.add_typer(kubernetes.k8s, name="k8s")


def main() -> None:
    """Runs the command; whatever goes wrong becomes one message and an exit code of 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except Exception as error:  # a traceback tells most people nothing; --debug shows it
        from shoal_services.console import mask_passwords

        is_debugged = bool(os.environ.get("SHOAL_DEBUG"))
        text = "".join(traceback.format_exception(error)) if is_debugged else f"shoal: {explain(error)}\n"
        sys.stderr.write(mask_passwords(text))
        sys.exit(1)


def explain(error: BaseException) -> str:
    """What went wrong, on one screen."""
    from pydantic import ValidationError

    # Ray wraps what was raised on a worker, and its own text is that worker's traceback.
    while isinstance(cause := getattr(error, "cause", None), Exception):
        error = cause
    if isinstance(error, ValidationError):
        lines = []
        for complaint in error.errors():
            key = ".".join(str(part) for part in complaint["loc"])
            lines.append(f"{key}: " * bool(key) + complaint["msg"].removeprefix("Value error, "))
        return _shorten("\n".join(lines))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f" ({error.filename})" if error.filename else ""
        return f"the storage is full{place}: make room, and give the same command again"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, TOLD_ERRORS):
        return _shorten(str(error) or type(error).__name__)
    if isinstance(error, MemoryError):
        return "there is not enough memory: make room, or choose a smaller model or window"
    advice = "This was not foreseen: `shoal --debug` and the rest of the command show where it happened"
    return f"{_shorten(f'{type(error).__name__}: {error}')}\n{advice}"


def _shorten(text: str) -> str:
    """As much as fits on a screen: the beginning of long lines, the first lines of many."""
    lines = [line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}…" for line in text.strip().splitlines()]
    return "\n".join([*lines[:MAX_LINES], *(["…"] if len(lines) > MAX_LINES else [])])
