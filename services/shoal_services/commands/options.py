"""Options that several commands share, and what they mean together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shoal.recipe import Texts

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
Streamed = Annotated[
    bool | None,
    typer.Option(
        "--streamed/--in-memory",
        help="Keep the blocks on disk, one at a time in memory; by default where memory would be short.",
        show_default=False,
    ),
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to use; by default a local one is started.")]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow server, instead of SQLite in the run's own folder.")]
NumCpus = Annotated[int | None, typer.Option(help="CPUs of the local cluster; by default all.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of a table.")]


def make_texts(train: list[str], evaluation: list[str], **sizes: int) -> Texts:
    """The texts that the options name. Raises ValueError for what cannot be."""
    from shoal.recipe import Texts

    return Texts.model_validate({"train": tuple(train), "evaluation": tuple(evaluation), **sizes})
