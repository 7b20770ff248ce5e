"""Options that several commands share, and what they mean together."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shoal.texts import Texts

Model = Annotated[
    str, typer.Argument(help="Hub id, folder, .gguf file, or a packaged alias: smollm2-135m, minilm-l6-v2, tiny-random.")
]
TrainText = Annotated[
    list[str], typer.Option("--text", help="Text to fit and distil on: Hub dataset, .txt, .jsonl, .parquet. Repeatable.")
]
EvaluationText = Annotated[
    list[str], typer.Option(help="Text to evaluate on; other than --text, or shared out. Repeatable.")
]
Tokens = Annotated[
    int | None, typer.Option(help="Tokens to calibrate on; by default 16 per hidden dimension, and at least 32,768.")
]
EvaluationTokens = Annotated[int, typer.Option(help="Tokens of each evaluation text.")]
Window = Annotated[int, typer.Option(help="Tokens per window in calibration and evaluation.")]
FittingWindow = Annotated[
    int | None, typer.Option(help="Tokens per window; by default 1024, or the model's context where that is shorter.")
]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; by default what the hardware is fast at.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
Streamed = Annotated[
    bool | None,
    typer.Option(
        "--streamed/--in-memory",
        help="Keep the blocks on disk, one at a time in memory; by default where memory would be short.",
        show_default=False,
    ),
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster that this machine belongs to: auto, or HOST:PORT; by default a local one.")
]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow server, instead of SQLite in the run's own folder.")]
NumCpus = Annotated[int | None, typer.Option(help="CPUs of the local cluster; by default all.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of a table.")]


def choose_window(window: int | None, models: list[str], revisions: Sequence[str | None] = (None,)) -> int:
    """The window that was asked for, or 1024 tokens, or what all of these models take."""
    from shoal.checkpoints.config import read_config
    from shoal.checkpoints.load import load_tokenizer
    from shoal.text.corpus import find_context

    if window is not None:
        return window
    contexts = [
        find_context(read_config(model, revision=one), load_tokenizer(model, revision=one))
        for model, one in product(models, revisions)
    ]
    return min([1024, *filter(None, contexts)])


def make_texts(train: list[str], evaluation: list[str], **sizes: int | None) -> Texts:
    """The texts that the options name. Raises ValueError for what cannot be."""
    from shoal.texts import Texts

    return Texts.model_validate({"train": tuple(train), "evaluation": tuple(evaluation), **sizes})
