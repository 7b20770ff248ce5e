"""Linear probing: how well logistic regression reads a label off the embeddings at each boundary of the blocks."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.checkpoints.names import recipe_of
from shoal.models.structure import find_blocks, watch_boundaries
from shoal.progress import Listener, ignore
from shoal.text.rows import read_rows
from shoal.text.windows import require_embeddings
from shoal.texts import text_format

BATCH_SIZE = 16
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class ProbeTexts:
    """Texts, each with the class that it belongs to."""

    name: str
    texts: list[str]
    labels: list[str]

    def require(self, num_folds: int) -> None:
        """Raises ValueError if there is one class alone, or a class has fewer texts than there are folds."""
        counts = Counter(self.labels)
        if len(counts) < 2:
            raise ValueError(f"{self.name!r} has the one label {self.labels[0]!r}: probing needs two classes or more")
        label, count = counts.most_common()[-1]
        if count < num_folds:
            raise ValueError(
                f"{self.name!r} has {count} texts with label {label!r}: {num_folds} folds need {num_folds} or more of each "
                "label; give more texts, or fewer folds"
            )

    @property
    def majority(self) -> float:
        """The share of the largest class: the accuracy of a probe that sees nothing."""
        return max(Counter(self.labels).values()) / len(self.labels)


def load_probe_texts(source: str) -> ProbeTexts:
    """The rows of a .jsonl or .parquet file or Hub dataset with `text` and `label` (a string, whole number or truth value).

    Raises ValueError that names the row for one that has not.
    """
    texts, labels = [], []
    for number, row in enumerate(read_rows(source), 1):
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str) or not text.strip() or not isinstance(label, str | int):
            raise ValueError(
                f"{source!r}, row {number}: 'text' {str(text)[:60]!r} must be a text and 'label' {label!r} a string, "
                f"a whole number or true or false; it has {', '.join(row)}"
            )
        texts.append(text)
        labels.append(str(label))
    if not texts:
        raise ValueError(f"{source!r} holds no labelled text")
    return ProbeTexts(Path(source).name if text_format(source) else source, texts, labels)


@dataclass(frozen=True)
class LayerProbe:
    """What a probe reached after `num_passed` blocks of the dense model."""

    num_passed: int
    accuracy: float
    standard_error: float


@dataclass(frozen=True)
class Probe:
    """A model's probes, one for each boundary, on one set of texts; `majority` is the share of the largest class."""

    model: str
    text: str
    num_examples: int
    num_classes: int
    num_folds: int
    majority: float
    layers: list[LayerProbe]

    def as_dict(self) -> dict[str, Any]:
        """The probes as JSON-able values."""
        return dataclasses.asdict(self)


def probe_model(
    name: str, labelled: ProbeTexts, *, window: int = 256, num_folds: int = 5, seed: int = 0,
    dtype: str | None = None, listen: Listener = ignore,
) -> Probe:  # fmt: skip
    """How well the labels can be read off model `name` at each boundary; of each text, the first `window` tokens.

    A compressed model's boundaries are named by those of its dense model that they stand for. Raises ValueError for
    a model that cannot be used, or too few texts.
    """
    labelled.require(num_folds)
    recipe = recipe_of(name)
    replaced = recipe.blocks or () if recipe else ()
    model, tokenizer = load_model(name, dtype=dtype), load_tokenizer(name)
    depth = len(find_blocks(model)) + len(replaced)
    passed = [*(block for block in range(depth) if block not in replaced), depth]
    features_lnd = embed_texts(model, tokenizer, labelled.texts, window=window, listen=listen)
    layers = []
    for index, features_nd in enumerate(features_lnd):
        layers.append(LayerProbe(passed[index], *probe(features_nd, labelled.labels, num_folds=num_folds, seed=seed)))
        listen(f"probe {name}", index + 1, len(features_lnd))
    num_classes = len(set(labelled.labels))
    return Probe(name, labelled.name, len(labelled.texts), num_classes, num_folds, labelled.majority, layers)


@torch.no_grad()
def embed_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], *, window: int, listen: Listener = ignore
) -> Tensor:
    """One embedding [boundaries, texts, d] of each text at each boundary: the mean over its tokens.

    Each token's embedding is brought to length 1 first, as a block's norm does: a sink, hundreds of times longer than
    the rest, counts as one token. Raises ValueError for a text without tokens.
    """
    rows = [tokenizer(text, truncation=True, max_length=window)["input_ids"] for text in texts]
    if not all(rows):
        raise ValueError(f"text {texts[rows.index([])]!r} has no tokens; leave it out")
    require_embeddings(torch.tensor([max(row) for row in rows]), model.config, tokenizer)
    batches = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        longest = max(map(len, batch))
        # After the text: what a causal model reads later changes nothing before.
        ids_bt = torch.tensor([row + [0] * (longest - len(row)) for row in batch], device=model.device)
        lengths_b = torch.tensor([len(row) for row in batch], device=model.device)
        mask_bt = torch.arange(longest, device=model.device) < lengths_b[:, None]
        means: list[Tensor] = []

        def take_mean(_boundary: int, stream_btd: Tensor, mask_bt: Tensor = mask_bt, means: list[Tensor] = means) -> None:
            unit_btd = functional.normalize(stream_btd.float(), dim=-1) * mask_bt[..., None]
            means.append((unit_btd.sum(1) / mask_bt.sum(1, keepdim=True)).cpu())

        with watch_boundaries(model, take_mean):
            model.base_model(input_ids=ids_bt, attention_mask=mask_bt.long(), use_cache=False)
        batches.append(torch.stack(means))
        listen("embed texts", min(start + BATCH_SIZE, len(rows)), len(rows))
    return torch.cat(batches, dim=1)


def probe(features_nd: Tensor, labels: list[str], *, num_folds: int = 5, seed: int = 0) -> tuple[float, float]:
    """Accuracy of logistic regression on texts that it was not fitted on, and its standard error over texts.

    Stratified cross-validation; features are standardised within each fold's training part.
    """
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    truth = np.array(labels)
    correct = cross_val_predict(regression, features_nd.numpy(), truth, cv=folds) == truth
    return float(correct.mean()), float(correct.std(ddof=1) / math.sqrt(len(correct)))
