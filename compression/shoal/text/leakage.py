"""The check that evaluation text was not seen in training."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from shoal.text.windows import TokenWindows

# 48 tokens are about 200 characters: shorter runs recur in independent texts (quotations, boilerplate, tables).
LEAK_NGRAM = 48


def check_overlap(seen: list[TokenWindows], evaluation: list[TokenWindows], *, ngram: int = LEAK_NGRAM) -> None:
    """Raises ValueError if any run of `ngram` tokens of the evaluation text stands in a text that was seen."""
    ngram = min([ngram, *(windows.ids.shape[1] for windows in [*seen, *evaluation])])
    known = [(windows.name, _hash_ngrams(windows.ids, ngram)) for windows in seen]
    for held in evaluation:
        hashes = _hash_ngrams(held.ids, ngram)
        for name, seen_hashes in known:
            shared = int(np.isin(hashes, seen_hashes).sum())
            if shared:
                raise ValueError(
                    f"evaluation text {held.name!r} overlaps {name!r}, which is used for calibration or distillation: "
                    f"{shared} of {hashes.size} runs of {ngram} tokens are in both; evaluate on other text"
                )


def _hash_ngrams(ids: Tensor, ngram: int) -> np.ndarray:
    """A 64-bit polynomial hash of every run of `ngram` tokens inside a window, sorted and unique."""
    rows = ids.numpy().astype(np.uint64) + np.uint64(1)
    hashes = np.zeros((rows.shape[0], rows.shape[1] - ngram + 1), dtype=np.uint64)
    for offset in range(ngram):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + rows[:, offset : offset + hashes.shape[1]]
    return np.unique(hashes)
