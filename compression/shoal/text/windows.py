"""Documents in, token windows of each role out; and the check that evaluation text was not seen in training."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from shoal.text.sources import Documents
from shoal.texts import Text

# Fractions of a source that several roles share. A role gets what it needs from its share, and no more.
SHARES = {"pretraining": 0.8, "calibration": 0.4, "distillation": 0.4, "selection": 0.08, "evaluation": 0.12}
# Chat tokenizers give the end of a turn as their `eos_token`; these end a document, where they have one.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
# Where a running text is cut, best first: before an article of WikiText, a paragraph, a line.
PLACES_TO_CUT = [re.compile(pattern, re.MULTILINE) for pattern in (r"^ ?= [^=\n].* = ?$", r"(?<=\n\n)(?=[^\n])", r"^")]
# A running text is tokenized in stretches: tokens at their seams may differ from those of the whole.
STRETCH = 4_000_000


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


def deal_documents(documents: Documents, roles: list[str], *, seed: int = 0) -> dict[str, Documents]:
    """Each role's own part, in proportion to `SHARES` by characters: whole documents, drawn at random.

    Running text, and documents too few to go round, are cut into a stretch for each role. Evaluation text, whether shared
    or not, is in the order of its source.
    """
    texts, name = documents.texts, documents.name
    if not documents.independent or len(texts) < 2 * len(roles):
        parts = _cut_stretches(texts, roles)
        return {role: Documents(name, parts[role], documents.independent) for role in roles}
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    bounds = _find_bounds(sum(map(len, texts)), roles)
    dealt: dict[str, list[int]] = {role: [] for role in roles}
    position, queue = 0, iter(roles)
    role = next(queue)
    for index in order:
        if position >= bounds[role] and (following := next(queue, None)):
            role = following
        dealt[role].append(index)
        position += len(texts[index])
    dealt["evaluation"] = sorted(dealt.get("evaluation", []))
    return {role: Documents(name, [texts[index] for index in dealt[role]]) for role in roles}


def _find_bounds(total: int, roles: list[str]) -> dict[str, float]:
    """Where each role's share of `total` characters ends."""
    bounds, share = {}, sum(SHARES[role] for role in roles)
    for count, role in enumerate(roles, 1):
        bounds[role] = sum(SHARES[one] for one in roles[:count]) / share * total
    return bounds


def _cut_stretches(texts: list[str], roles: list[str]) -> dict[str, list[str]]:
    """A stretch of the texts for each role, in turn."""
    bounds = _find_bounds(sum(map(len, texts)), roles)
    parts: dict[str, list[str]] = {role: [] for role in roles}
    position, queue = 0, iter(roles)
    role = next(queue)
    for text in texts:
        begin = 0
        while role != roles[-1] and position + len(text) - begin >= bounds[role]:
            end = _find_cut(text, begin, round(bounds[role]) - position + begin)
            parts[role].append(text[begin:end])
            position, begin, role = position + end - begin, end, next(queue)
        parts[role].append(text[begin:])
        position += len(text) - begin
    return {role: [part for part in parts[role] if part] for role in roles}


def _find_cut(text: str, begin: int, near: int) -> int:
    """A place to cut the text, not before `begin`, within 2 % of it around `near`; `near` itself if there is none."""
    slack = len(text) // 50
    low, high = max(begin, near - slack), min(len(text), near + slack)
    for places in PLACES_TO_CUT:
        if found := [match.start() for match in places.finditer(text, low, high) if match.start() > begin]:
            return min(found, key=lambda place: abs(place - near))
    return max(begin, near)


def make_windows(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, *, window: int, num_tokens: int | None = None
) -> TokenWindows:
    """Non-overlapping windows over the documents, each with the tokenizer's own prefix (BOS) if it sets one.

    Documents end in the tokenizer's end-of-text token, if it has one. At most `num_tokens` tokens (all there are, if None).
    Raises ValueError if the text does not fill one window.
    """
    prefix = _find_prefix(tokenizer)
    body = window - len(prefix)
    wanted = None if num_tokens is None else max(1, num_tokens // window) * body
    ids: list[int] = []
    for part in _tokenize(documents, tokenizer, wanted):
        ids += part
        if wanted is not None and len(ids) >= wanted:
            break
    num_windows = len(ids) // body if wanted is None else min(len(ids), wanted) // body
    if num_windows == 0:
        raise ValueError(
            f"text {documents.name!r} has {len(ids)} tokens, fewer than one window of {window}: give more text"
        )
    rows = torch.tensor(ids[: num_windows * body]).view(num_windows, body)
    rows = torch.cat([torch.tensor(prefix, dtype=rows.dtype).expand(num_windows, -1), rows], dim=1)
    return TokenWindows(rows, documents.name)


def _tokenize(documents: Documents, tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> Iterator[list[int]]:
    """Token ids of the documents in turn, or of a running text as one; about as much as is wanted at a time."""
    if documents.independent:
        end = find_end(tokenizer)
        for start in range(0, len(documents.texts), 64):
            batch = tokenizer(documents.texts[start : start + 64], add_special_tokens=False, verbose=False)["input_ids"]
            yield [token for ids in batch for token in (*ids, *([] if end is None else [end]))]
        return
    text = "".join(documents.texts)
    # No tokenizer puts 16 characters into a token on average.
    stretch = STRETCH if wanted is None else min(STRETCH, 16 * wanted + 1000)
    begin = 0
    while begin < len(text):
        # Before a line, since tokens do not reach over its beginning.
        end = len(text) if begin + stretch >= len(text) else text.rfind("\n", begin, begin + stretch) + 1 or begin + stretch
        yield tokenizer(text[begin:end], add_special_tokens=False, verbose=False)["input_ids"]
        begin = end


def find_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a document, None if the tokenizer has none."""
    added = tokenizer.get_added_vocab()
    return next((added[token] for token in END_OF_TEXT if token in added), tokenizer.eos_token_id)


def require_embeddings(ids: Tensor, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for a token that the model has no embedding for."""
    size: int = config.get_text_config(decoder=True).vocab_size
    highest = int(ids.max())
    if highest >= size:
        raise ValueError(
            f"the tokenizer makes token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) of this text, and the "
            f"model has embeddings for {size} tokens: they do not belong together; give the model its own tokenizer's files"
        )


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
