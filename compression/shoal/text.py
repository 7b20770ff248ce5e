"""Texts in, token windows out; and the check that evaluation text was not seen in calibration or distillation.

A source is one of
    wikipedia-sample                       100 English Wikipedia pages, packaged (gensim's test data)
    notes.txt  corpus.jsonl  data.parquet  a local file
    org/name  org/name:config  org/name:config@split   a Hub dataset
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shoal.files import require_path
from shoal.recipe import PACKAGED_TEXT, TEXT_SUFFIXES, Text

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_FIELDS = ("text", "content", "document", "story", "article")
# Fractions of a source that several roles share. A role gets what it needs from its share, and no more.
SHARES = {"pretraining": 0.8, "calibration": 0.4, "distillation": 0.4, "selection": 0.08, "evaluation": 0.12}
# 48 tokens are about 200 characters: shorter runs recur in independent texts (quotations, boilerplate, tables).
LEAK_NGRAM = 48
# Of a larger data set the first ones are used: some hundred million tokens.
MAX_DOCUMENTS = 200_000


@dataclass(frozen=True)
class Documents:
    """Texts from one source. `independent` ones may be shuffled; pieces of one long text may not."""

    name: str
    texts: list[str]
    independent: bool = True


@dataclass(frozen=True)
class TokenWindows:
    """Token ids [num_windows, window] of one text, with its name and the hash of exactly these ids."""

    ids: Tensor
    name: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.to(torch.int32).numpy().tobytes()).hexdigest()

    @property
    def num_tokens(self) -> int:
        return self.ids.numel()

    def __len__(self) -> int:
        return self.ids.shape[0]

    def describe(self) -> Text:
        """Name, hash and length, as they stand in a recipe."""
        return Text(name=self.name, sha256=self.sha256, num_tokens=self.num_tokens)

    def take(self, start: int, stop: int) -> TokenWindows:
        """Windows start..stop-1 under the same name."""
        return TokenWindows(self.ids[start:stop], self.name)


def load_documents(source: str) -> Documents:
    """The documents of a source (see the module's text for the forms that a source takes).

    Raises ValueError if it is not there, holds no text, or has no column that is clearly the text.
    """
    require_path(source, "text")
    if source == PACKAGED_TEXT:
        documents = Documents(source, _read_wikipedia_sample())
    elif Path(source).suffix in TEXT_SUFFIXES:
        documents = _read_file(Path(source))
    else:
        documents = _from_columns(source, open_dataset(source))
    texts = [text for text in documents.texts if text.strip()]
    if not texts:
        raise ValueError(f"{source!r} holds no text: every document is empty")
    return Documents(documents.name, texts, documents.independent)


def _read_wikipedia_sample() -> list[str]:
    """The pages of gensim's test dump that are articles, with the wiki markup taken out."""
    import bz2

    from gensim.corpora.wikicorpus import extract_pages, filter_wiki
    from gensim.test.utils import datapath

    dump = datapath("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")
    with bz2.open(dump) as file:
        pages = [filter_wiki(text) for _, text, _ in extract_pages(file, filter_namespaces=("0",))]
    # Redirects are shorter than 1,000 characters. Lines without a full stop are the remains of tables and lists.
    return [_keep_sentences(page) for page in pages if len(page) > 1000]


def _keep_sentences(page: str) -> str:
    lines = (line.strip().replace("'''", "").replace("''", '"') for line in page.splitlines())
    return "\n\n".join(line for line in lines if line.startswith("==") or ". " in line or line.endswith("."))


def _read_file(path: Path) -> Documents:
    if not path.is_file():
        raise ValueError(f"text file {str(path)!r} does not exist; check the path")
    if path.suffix == ".txt":
        return Documents(path.name, _split_pieces(path.read_text(encoding="utf-8", errors="replace")), independent=False)
    if path.stat().st_size == 0:
        return Documents(path.name, [])
    return _from_columns(path.name, open_dataset(str(path)))


def open_dataset(source: str) -> Dataset:
    """The rows of a .jsonl or .parquet file, or of a Hub dataset. Raises ValueError if it cannot be read."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    require_path(source, "data")
    path = Path(source)
    if path.suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise ValueError(f"data file {source!r} does not exist; check the path")
        kind = "json" if path.suffix == ".jsonl" else "parquet"
        try:
            return load_dataset(kind, data_files=source, split="train")
        except (DatasetsError, ValueError) as error:
            raise ValueError(f"data file {source!r} is damaged or no {path.suffix}: {_first_line(error)}") from error
    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    try:
        return load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"cannot load text {source!r}: it is not {PACKAGED_TEXT!r}, no local .txt, .jsonl or .parquet file, and not a "
            f"dataset that the Hub (or its cache) gives: {_first_line(error)}"
        ) from error


def _split_pieces(text: str, length: int = 8000) -> list[str]:
    """A long text in pieces of about `length` characters, cut at line ends (inside a line only if it is longer)."""
    pieces, lines, size = [], [], 0
    for whole in text.splitlines(keepends=True):
        for line in (whole[start : start + length] for start in range(0, len(whole), length)):
            lines.append(line)
            size += len(line)
            if size >= length:
                pieces.append("".join(lines))
                lines, size = [], 0
    return [*pieces, "".join(lines)]


def _from_columns(name: str, dataset: Dataset) -> Documents:
    columns = [
        c for c, feature in dataset.features.items() if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    named = [c for c in TEXT_FIELDS if c in columns] or (columns if len(columns) == 1 else [])
    if not named:
        raise ValueError(f"{name!r} has the text columns {columns}: rename the one to use to 'text'")
    rows = dataset.select(range(min(len(dataset), MAX_DOCUMENTS)))
    return Documents(name, [text or "" for text in rows[named[0]]])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def deal_documents(documents: Documents, roles: list[str], *, seed: int = 0) -> dict[str, list[str]]:
    """Each role's own documents, none in two roles, in proportion to `SHARES` by characters."""
    texts = list(documents.texts)
    if len(roles) > 1 and len(texts) < len(roles) * 2:
        texts = _split_pieces("\n".join(texts), length=max(200, sum(map(len, texts)) // (16 * len(roles))))
    if documents.independent:
        random.Random(seed).shuffle(texts)
    total_share = sum(SHARES[role] for role in roles)
    total = sum(len(text) for text in texts)
    dealt: dict[str, list[str]] = {role: [] for role in roles}
    position, bound, queue = 0, 0.0, iter(roles)
    role = next(queue)
    bound = SHARES[role] / total_share * total
    for text in texts:
        if position >= bound and (following := next(queue, None)):
            role = following
            bound += SHARES[role] / total_share * total
        dealt[role].append(text)
        position += len(text)
    return dealt


def make_windows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, *, name: str, window: int, num_tokens: int | None = None
) -> TokenWindows:
    """Non-overlapping windows of the joined texts, each with the tokenizer's own prefix (BOS) if it sets one.

    At most `num_tokens` tokens (all there are, if None). Raises ValueError if the text does not fill one window.
    """
    prefix = _find_prefix(tokenizer)
    body = window - len(prefix)
    wanted = None if num_tokens is None else max(1, num_tokens // window) * body
    ids: list[int] = []
    for start in range(0, len(texts), 64):
        if wanted is not None and len(ids) >= wanted:
            break
        batch = tokenizer(texts[start : start + 64], add_special_tokens=False, verbose=False)["input_ids"]
        ids += [token for document in batch for token in document]
    num_windows = len(ids) // body if wanted is None else min(len(ids), wanted) // body
    if num_windows == 0:
        raise ValueError(f"text {name!r} has {len(ids)} tokens, fewer than one window of {window}: give more text")
    rows = torch.tensor(ids[: num_windows * body]).view(num_windows, body)
    return TokenWindows(torch.cat([torch.tensor(prefix, dtype=rows.dtype).expand(num_windows, -1), rows], dim=1), name)


def close_windows(windows: TokenWindows, tokenizer: PreTrainedTokenizerBase) -> TokenWindows:
    """The windows with what the tokenizer puts after every text ([SEP], </s>) in the place of their last tokens."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    suffix = full[full.index(bare[-1]) + 1 :] if bare and bare[-1] in full else []
    ids = windows.ids.clone()
    ids[:, ids.shape[1] - len(suffix) :] = torch.tensor(suffix, dtype=ids.dtype)
    return TokenWindows(ids, windows.name)


def _find_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: BOS for Llama and Gemma, nothing for GPT-2 and SmolLM2."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return full[: full.index(bare[0])] if bare and bare[0] in full else []


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
