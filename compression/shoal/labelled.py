"""Texts with labels, and pairs of which one text is preferred: what classifiers and reward models learn from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from shoal.text import open_dataset

if TYPE_CHECKING:
    from datasets import Dataset

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

    Raises ValueError for columns that are not there, fewer than two classes or more than 64, or no rows.
    """
    dataset = open_dataset(source)
    _require_columns(source, dataset, [*text_columns, label_column])
    answers = dataset[label_column]
    feature = dataset.features[label_column]
    names = [feature.int2str(answer) for answer in answers] if hasattr(feature, "int2str") else [str(a) for a in answers]
    classes = sorted(set(names))
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise ValueError(
            f"column {label_column!r} of {source!r} has {len(classes)} classes ({', '.join(classes[:3])}…): a classifier "
            f"needs 2 to {MAX_CLASSES}; choose another --label-column"
        )
    number = {name: index for index, name in enumerate(classes)}
    columns = [dataset[column] for column in text_columns]
    texts = [_join(text_columns, parts) for parts in zip(*columns, strict=True)]
    return Labelled(source, texts, [number[name] for name in names], classes)


def load_preferences(source: str) -> Preferences:
    """A preference dataset with the columns `chosen` and `rejected`, and `prompt` before both if there is one.

    Raises ValueError for columns that are not there, or no rows.
    """
    dataset = open_dataset(source)
    _require_columns(source, dataset, ["chosen", "rejected"])
    prompts = dataset["prompt"] if "prompt" in dataset.column_names else [""] * len(dataset)
    chosen, rejected = (
        [f"{prompt}{answer}" for prompt, answer in zip(prompts, dataset[column], strict=True)]
        for column in ("chosen", "rejected")
    )
    return Preferences(source, chosen, rejected)


def _require_columns(source: str, dataset: Dataset, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(f"{source!r} has no column {missing[0]!r}; it has {', '.join(dataset.column_names)}")
    if len(dataset) < 4:
        raise ValueError(f"{source!r} has {len(dataset)} rows: too few to learn from and to check on")


def _join(columns: Sequence[str], parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else "\n".join(f"{c}: {p}" for c, p in zip(columns, parts, strict=True))


def _split_rows(count: int, held_out_share: float, seed: int) -> tuple[list[int], list[int]]:
    rows = list(range(count))
    random.Random(seed).shuffle(rows)
    bound = min(count - 1, max(1, round(count * held_out_share)))
    return rows[bound:], rows[:bound]
