"""`shoal profile` and `shoal compress`: one model, or several, on this machine."""

from __future__ import annotations

import json
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal_services.commands.options import (
    AsJson,
    Dtype,
    EvaluationText,
    EvaluationTokens,
    FittingWindow,
    Model,
    Revision,
    Streamed,
    Tokens,
    TrainText,
    choose_window,
    make_texts,
)  # fmt: skip

if TYPE_CHECKING:
    from shoal.linearity.profile import Profile
    from shoal.recipe import Recipe
    from shoal.texts import Texts
    from shoal.units import Unit


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
    kl = "kl"


def profile(
    models: Annotated[list[str], typer.Argument(help="Hub ids, folders, .gguf files, or aliases; several are compared.")],
    text: TrainText = ["wikipedia-sample"],  # noqa: B006
    calibration_tokens: Tokens = None,
    window: FittingWindow = None,
    dtype: Dtype = None,
    revision: Annotated[
        list[str], typer.Option(help="Branch, tag or commit of one Hub model; several are compared. Repeatable.")
    ] = [],  # noqa: B006
    streamed: Streamed = None,
    update_scale: Annotated[
        list[float], typer.Option(help="Also the scores if each block's update were so many times as large. Repeatable.")
    ] = [],  # noqa: B006
    page: Annotated[Path | None, typer.Option(help="Where to write the page; by default ./linearity-MODEL.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how linear every block is, of one model or of several side by side: decoders, encoders, or both stacks.

    In an encoder-decoder, the text is both source and target. Where a block ends in a norm (BERT, BART), “without
    residual” scores what the block changes altogether, y − x, the norm's rescaling of x among it.

    Examples:

        shoal profile smollm2-135m

        shoal profile HuggingFaceTB/SmolLM2-360M --text Salesforce/wikitext:wikitext-2-raw-v1@train --json

        shoal profile dense-folder finetuned-folder

        shoal profile minilm-l6-v2 smollm2-135m

        shoal profile smollm2-135m --update-scale 0.5 --update-scale 2

        shoal profile EleutherAI/pythia-70m --revision step1000 --revision step10000 --revision step143000
    """
    from shoal.linearity.profile import profile_model

    from shoal_services.commands.terminal import show_progress
    from shoal_services.console import name_of, say, show
    from shoal_services.pages.linearity_page import is_one_model, write_comparison_page, write_linearity_page
    from shoal_services.pages.tables import comparison_table, linearity_table, scale_table

    if len(models) > 1 and revision:
        raise ValueError("--revision chooses among the revisions of one model; name one model, or none of its revisions")
    revisions: list[str | None] = [*revision] or [None]
    window = choose_window(window, models, revisions)
    texts = make_texts(text, text, calibration_tokens=calibration_tokens, window=window)
    measured: list[Profile] = []
    with show_progress() as listen:
        for model, one in product(models, revisions):

            def listen_for(stage: str, done: int, total: int, label: str = f"{model}@{one}" if one else model) -> None:
                listen(f"{stage}, {label}" if len(models) + len(revisions) > 2 else stage, done, total)

            measured += profile_model(
                model, texts, revision=one, dtype=dtype, streamed=streamed, update_scales=update_scale, listen=listen_for
            )
    first = measured[0]
    page = page or Path(f"linearity-{name_of(models[0])}.html")
    if len(measured) == 1:
        write_linearity_page(page, first.model, first.scores, first)
    else:
        write_comparison_page(page, measured)
    if as_json:
        print(json.dumps(first.as_dict() if len(measured) == 1 else [one.as_dict() for one in measured], indent=2))
        return
    for part in measured if is_one_model(measured) else ():
        show(linearity_table(part.label, part.scores))
    if len(measured) > 1:
        show(comparison_table(measured))
    for profile in measured if update_scale else ():
        show(scale_table(profile))
    say(f"page: {page}")


def compress(
    model: Model,
    num_replaced: Annotated[int | None, typer.Option("--num-replaced", "-n", help="How many blocks to replace.")] = None,
    parameters: Annotated[
        str | None, typer.Option(help="How much may stay, instead of how many blocks go: 85% of the dense parameters.")
    ] = None,
    megabytes: Annotated[
        float | None, typer.Option(help="The same as the size of the weights at this dtype, in MB.")
    ] = None,
    kv_cache: Annotated[str | None, typer.Option(help="The same for the KV cache: 70% of the dense model's.")] = None,
    parts: Annotated[
        bool, typer.Option("--parts", help="With such a budget: let the attention and the MLP of a block go apart.")
    ] = False,
    blocks: Annotated[
        str | None, typer.Option(help="Which blocks, or parts of them, instead of how many: 12,13.mlp,15.attention.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to make; by default MODEL-KIND-N, and what else is done.")
    ] = None,
    kind: Annotated[KindName, typer.Option(help="linear, low_rank (with --rank), folded, dropped.")] = KindName.linear,
    rank: Annotated[int | None, typer.Option(help="Rank of the maps of kind low_rank.")] = None,
    selection: Annotated[
        SelectionName | None, typer.Option(help="How blocks are chosen: by kl, or if streamed by linearity.")
    ] = None,
    weight_share: Annotated[
        float | None, typer.Option(help="Share of the kept blocks' weights that low-rank factors keep (SVD): 0.8.")
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Zeros in the kept blocks' weights (Wanda): a share such as 0.5, or 2:4, or 4:8.")
    ] = None,
    distil_tokens: Annotated[int, typer.Option(help="Tokens to distil on; 0 fits in closed form only.")] = 0,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak; by default 1.5e-4, of all weights 1e-4, of lora or maps 5e-4.")
    ] = None,
    trained: Annotated[str, typer.Option(help="What distillation trains: maps, lora (and maps), blocks, all.")] = "blocks",
    text: TrainText = ["wikipedia-sample"],  # noqa: B006
    evaluation_text: EvaluationText = ["wikipedia-sample"],  # noqa: B006
    calibration_tokens: Tokens = None,
    evaluation_tokens: EvaluationTokens = 16_384,
    window: FittingWindow = None,
    dtype: Dtype = None,
    revision: Revision = None,
    seed: Annotated[int, typer.Option(help="Seed of the distillation.")] = 0,
    streamed: Streamed = None,
    as_json: AsJson = False,
) -> None:
    """Make one smaller model: choose blocks, fit their replacements, thin the other weights, distil, evaluate, store.

    Of an encoder, or of the encoder of an encoder-decoder, blocks are replaced in closed form; what it costs is measured by
    the masked-LM or seq2seq loss, or where there is no such head by how far the texts' embeddings turn.

    Examples:

        shoal compress smollm2-135m --num-replaced 6

        shoal compress smollm2-135m --parameters 85% --parts

        shoal compress smollm2-135m --kv-cache 70% --parts

        shoal compress smollm2-135m -n 8 --kind folded --distil-tokens 131072 -o smol-22

        shoal compress smollm2-135m -n 4 --kind folded --sparsity 2:4

        shoal compress smollm2-135m -n 0 --weight-share 0.8

        shoal compress ./larger-than-memory -n 6 --streamed

        shoal compress minilm-l6-v2 -n 1

        shoal compress ./my-llama --blocks 12,13,14 --text corpus.txt --evaluation-text held-out.txt
    """
    from shoal.checkpoints.config import read_config
    from shoal.compression import compress as run
    from shoal.models.structure import is_causal
    from shoal.recipe import Distillation, Recipe

    from shoal_services.commands.terminal import show_progress
    from shoal_services.console import name_of, say, show
    from shoal_services.pages.tables import point_table

    listed = _parse_blocks(blocks)
    if [num_replaced, parameters, megabytes, kv_cache, listed].count(None) != 4:
        raise ValueError("give one of --num-replaced, --parameters, --megabytes, --kv-cache and --blocks")
    count = len(listed) if listed is not None else num_replaced or 0
    share, kv_share = _parse_share("--parameters", parameters), _parse_share("--kv-cache", kv_cache)
    if megabytes is not None:
        share = _find_share(megabytes, model, revision, dtype)
    if share is None and kv_share is None and count < (1 if weight_share is None and sparsity is None else 0):
        raise ValueError(
            f"--num-replaced {count}: choose 1 or more blocks to replace, or 0 with --sparsity or --weight-share"
        )
    recipe = Recipe.model_validate(
        {
            "base_model": model, "revision": revision, "num_replaced": count, "parameters": share,
            "kv_cache": kv_share, "parts": parts,
            "blocks": listed, "kind": kind.value, "rank": rank, "seed": seed, "dtype": dtype,
            "selection": "listed" if listed is not None else selection and selection.value,
            "weight_share": weight_share, "sparsity": sparsity,
            "distillation": Distillation.model_validate(
                {"num_tokens": distil_tokens, "learning_rate": learning_rate, "trained": trained}
            ) if distil_tokens else None,
        }
    )  # fmt: skip
    window = choose_window(window, [model], [revision])
    texts = make_texts(
        text, evaluation_text, calibration_tokens=calibration_tokens, evaluation_tokens=evaluation_tokens, window=window
    )
    folder = out or Path(f"{name_of(model)}-{recipe.short_name}")
    if not is_causal(read_config(model, revision=revision)):
        if streamed:
            raise ValueError("an encoder cannot be streamed; leave out --streamed")
        _compress_encoder(recipe, folder, texts, as_json)
        return
    with show_progress() as listen:
        point = run(recipe, folder, texts=texts, streamed=streamed, listen=listen)
    if as_json:
        print(point.model_dump_json(indent=2))
        return
    show(point_table(point))
    say(f"model: {folder}\ncard:  {folder / 'README.md'}\nload:  shoal.load({str(folder)!r})")


def _compress_encoder(recipe: Recipe, folder: Path, texts: Texts, as_json: bool) -> None:
    from shoal.encoders import compress_encoder

    from shoal_services.commands.terminal import show_progress
    from shoal_services.console import say, show
    from shoal_services.pages.tables import cost_table

    with show_progress() as listen:
        point = compress_encoder(recipe, folder, texts=texts, listen=listen)
    if as_json:
        print(point.model_dump_json(indent=2))
        return
    show(cost_table(point))
    say(f"model: {folder}\nload:  shoal.load({str(folder)!r})")


def _parse_blocks(blocks: str | None) -> tuple[Unit, ...] | None:
    from shoal.units import read_unit

    try:
        return None if blocks is None else tuple(read_unit(block) for block in blocks.split(","))
    except ValueError as error:
        raise ValueError(f"--blocks {blocks!r}: {error}") from error


def _parse_share(option: str, text: str | None) -> float | None:
    """A share between 0 and 1, given as 85% or 0.85."""
    if text is None:
        return None
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"{option} {text!r} is no share of the dense model's: give 85% or 0.85")
    return share


def _find_share(megabytes: float, model: str, revision: str | None, dtype: str | None) -> float:
    """The share of its parameters that makes a model so large. Raises ValueError for what it is not larger than."""
    from shoal.checkpoints.config import count_bytes, make_skeleton
    from shoal.checkpoints.device import choose_device, read_dtype

    skeleton = make_skeleton(model, revision=revision, dtype=read_dtype(dtype, choose_device()))
    dense = count_bytes(skeleton) / 1e6
    if not 0 < megabytes < dense:
        raise ValueError(f"--megabytes {megabytes:g}: the dense model takes {dense:.0f} MB; give less than that")
    return megabytes / dense
