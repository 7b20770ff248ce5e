"""Texts with labels, and pairs of which one text is preferred: what classifiers and reward models learn from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from shoal.text.rows import Row, read_rows
from shoal.text.sources import write_chat

MAX_CLASSES = 64


@dataclass(frozen=True)
class Labelled:
    """Texts and their class numbers, which index `classes`."""

    name: str
    texts: list[str]
    labels: list[int]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def split(self, held_out_share: float, *, seed: int = 0) -> tuple[Self, Self]:
        """(rest, held out), shuffled. Raises ValueError if either lacks all but one class."""
        parts = [self.take(rows) for rows in _split_rows(len(self), held_out_share, seed)]
        for part in parts:
            if len(set(part.labels)) < 2:
                raise ValueError(f"{self.name!r} is too small or one-sided: of its {len(self)} texts, a part has one class")
        return parts[0], parts[1]

    def take(self, rows: Sequence[int]) -> Self:
        """These rows alone."""
        return type(self)(self.name, [self.texts[r] for r in rows], [self.labels[r] for r in rows], self.classes)


@dataclass(frozen=True)
class Preferences:
    """Pairs of texts: chosen[i] is better than rejected[i]."""

    name: str
    chosen: list[str]
    rejected: list[str]

    def __len__(self) -> int:
        return len(self.chosen)

    def split(self, held_out_share: float, *, seed: int = 0) -> tuple[Self, Self]:
        """(rest, held out), shuffled."""
        first, second = (self.take(rows) for rows in _split_rows(len(self), held_out_share, seed))
        return first, second

    def take(self, rows: Sequence[int]) -> Self:
        """These rows alone."""
        return type(self)(self.name, [self.chosen[r] for r in rows], [self.rejected[r] for r in rows])


def load_labelled(source: str, *, text_columns: Sequence[str] = ("text",), label_column: str = "label") -> Labelled:
    """A classification dataset: .jsonl, .parquet or Hub. Several text columns become lines of "column: text".

    Raises ValueError for columns that are not there, a row without text or label, fewer than two classes or more than 64,
    or no rows.
    """
    rows = _read_columns(source, [*text_columns, label_column])
    names = [str(_require(source, number, label_column, row)) for number, row in enumerate(rows, 1)]
    classes = sorted(set(names))
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise ValueError(
            f"column {label_column!r} of {source!r} has {len(classes)} classes ({', '.join(classes[:3])}…): a classifier "
            f"needs 2 to {MAX_CLASSES}; choose another --label-column"
        )
    number_of = {name: index for index, name in enumerate(classes)}
    texts = []
    for number, row in enumerate(rows, 1):
        parts = [_require_text(source, number, column, row) for column in text_columns]
        if not any(part.strip() for part in parts):
            raise ValueError(f"{source!r}, row {number}, has no text; leave such rows out")
        texts.append(_join(text_columns, parts))
    return Labelled(source, texts, [number_of[name] for name in names], classes)


def load_preferences(source: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Preferences:
    """A preference dataset with the columns `chosen` and `rejected`, and `prompt` before both if there is one.

    Conversations are written by the tokenizer's chat template. Raises ValueError for columns that are not there, what is
    neither text nor a conversation, or no rows.
    """
    rows = _read_columns(source, ["chosen", "rejected"])
    chosen, rejected = (
        [_write_answer(source, number, column, row, tokenizer) for number, row in enumerate(rows, 1)]
        for column in ("chosen", "rejected")
    )
    return Preferences(source, chosen, rejected)


def _write_answer(source: str, number: int, column: str, row: Row, tokenizer: PreTrainedTokenizerBase | None) -> str:
    prompt, answer = row.get("prompt") or "", _require(source, number, column, row)
    if not isinstance(answer, list):
        if not isinstance(prompt, str):
            raise ValueError(f"{source!r}, row {number}: the prompt is a conversation, and {column!r} is none")
        return prompt + _require_text(source, number, column, row)
    before = prompt if isinstance(prompt, list) else []
    if isinstance(prompt, str) and prompt and not any(_says(message, prompt) for message in answer):
        before = [{"role": "user", "content": prompt}]
    try:
        return write_chat([*before, *answer], tokenizer) or ""
    except ValueError as error:
        raise ValueError(f"{source!r}, row {number}: {error}") from error


def _says(message: Any, text: str) -> bool:
    """Many data sets have the prompt in a column, and again as the first message of both answers."""
    return isinstance(message, dict) and message.get("content") == text


def _read_columns(source: str, columns: Sequence[str]) -> list[Row]:
    """The rows of a source, if it has these columns."""
    rows = list(read_rows(source))
    found = list(dict.fromkeys(column for row in rows for column in row))
    missing = [column for column in columns if column not in found]
    if rows and missing:
        raise ValueError(f"{source!r} has no column {missing[0]!r}; it has {', '.join(found)}")
    if len(rows) < 4:
        raise ValueError(f"{source!r} has {len(rows)} rows: too few to learn from and to check on")
    return rows


def _require(source: str, number: int, column: str, row: Row) -> Any:
    value = row.get(column)
    if value is None:
        raise ValueError(f"{source!r}, row {number}, has no {column!r}; leave such rows out")
    return value


def _require_text(source: str, number: int, column: str, row: Row) -> str:
    value = _require(source, number, column, row)
    if not isinstance(value, str):
        raise ValueError(f"{source!r}, row {number}: {column!r} is {str(value)[:60]!r}, and no text")
    return value


def _join(columns: Sequence[str], parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else "\n".join(f"{c}: {p}" for c, p in zip(columns, parts, strict=True))


def _split_rows(count: int, held_out_share: float, seed: int) -> tuple[list[int], list[int]]:
    rows = list(range(count))
    random.Random(seed).shuffle(rows)
    bound = min(count - 1, max(1, round(count * held_out_share)))
    return rows[bound:], rows[:bound]
