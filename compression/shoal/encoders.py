"""The story for encoders, and for the encoder of an encoder-decoder: load → choose → fit → replace → measure → store.

Its steps are those of `shoal.compression`; maps are fitted in order, as in decoders. What differs is the measure. An
encoder predicts no next token, so what a replacement costs is measured
    with a masked-LM head      by the loss of masked tokens,
    of an encoder-decoder      by the loss of the decoder that is to say the text that its encoder read, masked if there is
                               a mask token, and
    of a sentence encoder      by how far a text's embedding, the mean over its tokens, turns: 1 − cosine to the dense one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.checkpoints.hashes import hash_folder
from shoal.checkpoints.load import load_model
from shoal.checkpoints.store import save
from shoal.compression import fit, load_texts, name_inputs, replace, require_free
from shoal.errors import Collapsed
from shoal.files import write_text
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.scores import require_calibration
from shoal.measure.perplexity import mean_and_error, require_two_windows
from shoal.models.structure import is_causal
from shoal.progress import Listener, ignore
from shoal.recipe import Recipe
from shoal.replace.choose import choose_blocks
from shoal.text.windows import TokenWindows
from shoal.texts import Text, Texts
from shoal.value import Value

MASKED_SHARE = 0.15  # BERT's
BATCH_SIZE = 8


class Cost(Value):
    """What a replacement costs on one text: a measure of the dense model and of the changed one, means over windows with
    their standard errors, and the difference, paired."""

    measure: str
    text: Text
    dense: float
    dense_standard_error: float
    value: float
    standard_error: float
    difference: float
    difference_standard_error: float


class EncoderPoint(Value):
    """A compressed encoder: what was made, what it costs, and how large it is."""

    recipe: Recipe
    costs: tuple[Cost, ...]
    num_parameters: int
    dense_num_parameters: int
    artefact: str
    artefact_sha256: str


def compress_encoder(
    recipe: Recipe, folder: Path, *, texts: Texts | None = None, listen: Listener = ignore
) -> EncoderPoint:
    """Makes the encoder (or encoder-decoder) that the recipe describes, writes it to `folder`, and returns what it costs.

    Raises ValueError for a recipe that an encoder cannot fulfil, FileExistsError if `folder` is there, `Collapsed` if a
    loss is not finite.
    """
    _require_closed_form(recipe)
    require_free(folder)
    listen("load", 0, 1)
    model = load_model(recipe.base_model, revision=recipe.revision, dtype=recipe.dtype, any_kind=True)
    if is_causal(model.config):
        raise ValueError(f"{recipe.base_model!r} is a decoder: shoal.compress makes it shallower")
    tokenizer, corpus = load_texts(recipe, model, texts)
    require_calibration(corpus.calibration, model)
    recipe, windows = name_inputs(recipe, model, corpus), corpus.calibration
    listen("load", 1, 1)
    moments = measure_moments(model, windows, on_progress=lambda done: listen("moments", done, len(windows)))
    recipe = recipe.settle(streamed=True)  # by linearity: the judge reads next-token distributions
    recipe = recipe.model_copy(update={"blocks": choose_blocks(recipe, moments), "refit": False})
    changed = replace(model, fit(recipe, model, windows, moments, listen=listen))
    costs = tuple(measure_cost(model, changed, tokenizer, text, listen=listen) for text in corpus.evaluation)
    save(changed, tokenizer, folder, recipe=recipe)
    point = EncoderPoint(
        recipe=recipe, costs=costs, num_parameters=changed.num_parameters(), dense_num_parameters=model.num_parameters(),
        artefact=str(folder), artefact_sha256=hash_folder(folder),
    )  # fmt: skip
    write_text(folder / "costs.json", point.model_dump_json(indent=2))
    return point


def _require_closed_form(recipe: Recipe) -> None:
    asked = {
        "distillation": recipe.distillation is not None, "sparsity": recipe.sparsity is not None,
        "weight_share": recipe.weight_share is not None, "a choice by KL": recipe.asks_for_kl,
        "kind='folded'": recipe.kind == "folded",
    }  # fmt: skip
    for name, is_asked in asked.items():
        if is_asked:
            raise ValueError(
                f"{name} needs a causal decoder; blocks of an encoder can be replaced by kind 'linear', 'low_rank' or "
                "'dropped', in closed form"
            )


def measure_cost(
    dense: PreTrainedModel,
    changed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: TokenWindows,
    *,
    listen: Listener = ignore,
) -> Cost:
    """What the change costs on a text. Raises ValueError for fewer than two windows, `Collapsed` if it is not finite."""
    require_two_windows(windows)
    measure, score = _choose_measure(dense, tokenizer)
    values = []
    for index, model in enumerate((dense, changed)):
        rows: list[Tensor] = []
        for start in range(0, len(windows), BATCH_SIZE):
            rows.append(score(model, windows.ids[start : start + BATCH_SIZE].to(model.device), start).double().cpu())
            listen(f"evaluate on {windows.name}", index * len(windows) + start, 2 * len(windows))
        values.append(torch.cat(rows))
    listen(f"evaluate on {windows.name}", 2 * len(windows), 2 * len(windows))
    if not all(bool(rows.isfinite().all()) for rows in values):
        raise Collapsed(f"the {measure} on {windows.name!r} is not finite: the model is broken")
    before, after = values
    (mean, error), (dense_mean, dense_error) = mean_and_error(after), mean_and_error(before)
    difference, difference_error = mean_and_error(after - before)
    return Cost(
        measure=measure, text=windows.describe(), dense=dense_mean, dense_standard_error=dense_error, value=mean,
        standard_error=error, difference=difference, difference_standard_error=difference_error,
    )  # fmt: skip


Score = Callable[[PreTrainedModel, Tensor, int], Tensor]
"""A model's score for each of some windows [batch, time]; the number of the first says which tokens are masked."""


def _choose_measure(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Score]:
    mask_id = tokenizer.mask_token_id

    @torch.no_grad()
    def find_masked_loss(model: PreTrainedModel, ids: Tensor, first: int) -> Tensor:
        masked = choose_masked(ids, first)
        logits = model(input_ids=ids.masked_fill(masked, mask_id)).logits
        return _mean_loss(logits, ids, masked)

    @torch.no_grad()
    def find_target_loss(model: PreTrainedModel, ids: Tensor, first: int) -> Tensor:
        source = ids if mask_id is None else ids.masked_fill(choose_masked(ids, first), mask_id)
        return _mean_loss(model(input_ids=source, labels=ids, use_cache=False).logits, ids, torch.ones_like(ids).bool())

    @torch.no_grad()
    def find_turn(model: PreTrainedModel, ids: Tensor, _first: int) -> Tensor:
        mean, aim = (each.base_model(input_ids=ids).last_hidden_state.float().mean(1) for each in (model, dense))
        return (1 - cosine_similarity(mean.double(), aim.double())).clamp(min=0)  # rounding goes below

    if dense.config.is_encoder_decoder:
        return "seq2seq loss", find_target_loss
    if dense.get_output_embeddings() is None:
        return "embedding, 1 − cosine to dense", find_turn
    if mask_id is None:
        raise ValueError("the tokenizer has no mask token, so the masked-LM loss cannot be measured")
    return "masked-LM loss", find_masked_loss


def choose_masked(ids: Tensor, first: int) -> Tensor:
    """Which tokens of windows [batch, time] are masked: `MASKED_SHARE` of each, never its first or last.

    Always the same for the window of a number, `first` for the first of these.
    """
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    inner = ids.shape[1] - 2
    for row in range(len(ids)):
        places = torch.randperm(inner, generator=torch.Generator().manual_seed(first + row))
        chosen[row, 1 + places[: max(1, round(MASKED_SHARE * inner))]] = True
    return chosen


def _mean_loss(logits: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """The mean loss in nats of each window's tokens [batch] that count."""
    loss = cross_entropy(logits.float().transpose(1, 2), ids, reduction="none").double()
    return (loss * counted).sum(1) / counted.sum(1)
