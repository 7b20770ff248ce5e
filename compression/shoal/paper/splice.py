"""What one block is worth: the loss with the block taken out, or its best affine map in its place.

A linearity score says how much of the stream's variance a map explains, not what the rest of the model makes of the
remainder; splicing the map in and reading the loss does (the control of arXiv 2605.27819).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.moments import Moments
from shoal.linearity.scores import BlockLinearity, require_calibration, score_blocks
from shoal.measure.perplexity import mean_and_error, score_windows
from shoal.measure.targets import TeacherTargets, measure_targets
from shoal.progress import Listener, count_on, ignore
from shoal.replace.fit import fit_independent
from shoal.replace.maps import Replacement, make_replaced
from shoal.text.corpus import load_corpus
from shoal.text.windows import TokenWindows
from shoal.texts import Text, Texts


@dataclass(frozen=True)
class Splice:
    """How much the loss rises, in nats per token, if one block is removed or replaced by its map.

    Standard errors are of the paired difference to the whole model, over windows.
    """

    block: int
    removed: float
    removed_standard_error: float
    mapped: float
    mapped_standard_error: float


@dataclass(frozen=True)
class Worth:
    """What every block of a model is worth on one text, beside its linearity."""

    model: str
    text: Text
    scores: list[BlockLinearity]
    splices: list[Splice]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        blocks = [
            {**dataclasses.asdict(splice), "held_out": score.held_out, "norm_ratio": score.norm_ratio}
            for score, splice in zip(self.scores, self.splices, strict=True)
        ]
        return {"model": self.model, "text": self.text.model_dump(), "blocks": blocks}

    def correlate(self, field: str, cost: str) -> float:
        """Spearman's rank correlation over the blocks of a field of `BlockLinearity` with `removed` or `mapped`."""
        costs = [getattr(splice, cost) for splice in self.splices]
        return float(spearmanr([getattr(score, field) for score in self.scores], costs).statistic)


def find_worth(
    name: str, texts: Texts, *, revision: str | None = None, dtype: str | None = None, listen: Listener = ignore
) -> Worth:
    """What every block of model `name` is worth on the first evaluation text; maps are fitted on the calibration text.

    Raises ValueError for a model or text that cannot be used, or too few tokens.
    """
    listen("load", 0, 1)
    model, tokenizer = load_model(name, revision=revision, dtype=dtype), load_tokenizer(name, revision=revision)
    corpus = load_corpus(texts, tokenizer, model.config)
    require_calibration(corpus.calibration, model)
    listen("load", 1, 1)
    windows, held = corpus.calibration, corpus.evaluation[0]
    moments = measure_moments(model, windows, on_progress=count_on(listen, "moments", 0, len(windows)))
    scores = score_blocks(moments)
    dense = measure_targets(model, held, num_top=1, on_progress=count_on(listen, "whole model", 0, len(held)))
    splices = measure_splices(
        model, moments, held, dense, on_progress=count_on(listen, "one block less", 0, moments.num_blocks)
    )
    return Worth(f"{name}@{revision}" if revision else name, held.describe(), scores, splices)


@torch.no_grad()
def measure_splices(
    model: PreTrainedModel,
    moments: Moments,
    windows: TokenWindows,
    dense: TeacherTargets,
    *,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> list[Splice]:
    """Every block's worth on `windows`, which the moments should not have seen; one change at a time.

    `dense` are the model's own targets there; `on_progress` hears the blocks done.
    """
    dense_nll = dense.nll.double().mean(1)
    found = []
    for block in range(moments.num_blocks):
        rises: list[float] = []
        for replacement in (Replacement((block,)), fit_independent(moments, (block,))):
            scores = score_windows(make_replaced(model, replacement), windows, dense)
            rises += mean_and_error(scores.nll - dense_nll)
        found.append(Splice(block, *rises))
        on_progress(block + 1)
    return found
