"""The `shoal` command: what it is made of, and how errors end it."""

from __future__ import annotations

import errno
import os
import sys
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
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f" ({error.filename})" if error.filename else ""
        return f"the storage is full{place}: make room, and give the same command again"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return "\n".join((str(error) or type(error).__name__).splitlines()[:20])
