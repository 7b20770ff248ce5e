"""A model looked at without changing it: the linearity of its blocks, or its quality beside the dense model's."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from shoal.checkpoints.config import is_memory_short
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.scores import RANKING, BlockLinearity, ScaledScores, require_calibration, score_blocks, score_scaled
from shoal.linearity.token_errors import (
    EDGES,
    NonlinearToken,
    count_errors,
    find_nonlinear_tokens,
    measure_token_errors,
    take_quantiles,
)
from shoal.models.structure import Stack, find_stacks
from shoal.progress import Listener, ignore
from shoal.text.corpus import Corpus, load_corpus
from shoal.texts import Text, Texts


@dataclass(frozen=True)
class Profile:
    """The linearity of a model's blocks on one text. Of the errors per token: quantiles .5, .9, .99 and 1 for each block,
    a histogram for each block, and the least linear tokens. `scaled`: mean scores for updates of other sizes. `stack`:
    which of an encoder-decoder's two."""

    model: str
    text: Text
    scores: list[BlockLinearity]
    token_errors: list[list[float]]
    error_counts: list[list[int]]
    nonlinear_tokens: list[NonlinearToken]
    scaled: Sequence[ScaledScores] = ()
    stack: str | None = None

    @property
    def label(self) -> str:
        """The model, and the stack if it has two."""
        return f"{self.model} ({self.stack})" if self.stack else self.model

    def as_dict(self) -> dict[str, Any]:
        """The profile as JSON-able values."""
        blocks = [
            {**dataclasses.asdict(score), "token_error_quantiles": errors, "token_error_counts": counts}
            for score, errors, counts in zip(self.scores, self.token_errors, self.error_counts, strict=True)
        ]
        return {
            "model": self.model, "stack": self.stack, "text": self.text.model_dump(), "ranks_by": RANKING, "blocks": blocks,
            "token_error_edges": EDGES, "nonlinear_tokens": [dataclasses.asdict(one) for one in self.nonlinear_tokens],
            "update_scales": [dataclasses.asdict(one) for one in self.scaled],
        }  # fmt: skip

    def mean(self, field: str) -> float:
        """A score of the blocks, mean over all of them: the paper's one number for a model (Fig. 2, Table 1)."""
        return statistics.fmean(getattr(score, field) for score in self.scores)


def profile_model(
    name: str,
    texts: Texts,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    streamed: bool | None = None,
    update_scales: Sequence[float] = (),
    listen: Listener = ignore,
) -> list[Profile]:
    """How linear every block of model `name` is on the calibration text; also with updates `update_scales` times as large.

    One profile, or of an encoder-decoder two, its encoder's and its decoder's; the text is both source and target.

    `streamed`: with the blocks on disk, a block at a time in memory; if not given, where memory would be short.

    Raises ValueError for a model or text that cannot be used, or too few tokens.
    """
    listen("load", 0, 1)
    if streamed is None:
        streamed = is_memory_short(name, revision=revision, dtype=dtype)
    model = load_model(name, revision=revision, dtype=dtype, streamed=streamed, any_kind=True)
    tokenizer = load_tokenizer(name, revision=revision)
    corpus = load_corpus(texts, tokenizer, model.config)
    require_calibration(corpus.calibration, model)
    listen("load", 1, 1)
    profiles = [_profile_stack(stack, corpus, tokenizer, update_scales, listen) for stack in find_stacks(model)]
    label = f"{name}@{revision}" if revision else name
    return [dataclasses.replace(one, model=label, stack=one.stack if len(profiles) > 1 else None) for one in profiles]


def _profile_stack(
    stack: Stack, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, update_scales: Sequence[float], listen: Listener
) -> Profile:
    windows = corpus.calibration
    moments = measure_moments(
        stack.model, windows, stack=stack, on_progress=lambda done: listen("moments", done, len(windows))
    )
    scores, scaled = score_blocks(moments, stack.model.device), score_scaled(moments, update_scales)
    listen("token errors", 0, 1)
    errors = measure_token_errors(stack, corpus.selection, moments)
    strangest = find_nonlinear_tokens(errors, corpus.selection, tokenizer)
    listen("token errors", 1, 1)
    return Profile(
        type(stack.model).__name__, windows.describe(), scores, take_quantiles(errors), count_errors(errors), strangest,
        scaled, stack.name,
    )  # fmt: skip
