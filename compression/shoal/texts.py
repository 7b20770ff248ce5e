"""Which texts are used, and how much: what is asked for (`Texts`), and what each turned out to be (`Text`)."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated

from pydantic import BeforeValidator, Field

from shoal.value import Value

TEXT_FORMATS = (".txt", ".jsonl", ".json", ".parquet")
# Of text and JSON; parquet is packed inside.
PACKED = (".gz", ".zst", ".bz2", ".xz")
PACKAGED_TEXT = "wikipedia-sample"


class Text(Value):
    """A text that was used: where it came from, what exactly it was, how much of it."""

    name: str
    sha256: str | None = None
    num_tokens: int = Field(ge=1)


def text_format(source: str) -> str | None:
    """Which of `TEXT_FORMATS` the name of a local file says, packed or not; None for other sources."""
    path = PurePath(source.lower())
    is_packed = path.suffix in PACKED
    name = path.stem if is_packed else path.name
    suffix = PurePath(name).suffix
    return suffix if suffix in TEXT_FORMATS and not (is_packed and suffix == ".parquet") else None


def _as_tuple(names: object) -> object:
    return (names,) if isinstance(names, str) else names


Sources = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class Texts(Value):
    """Where the texts come from (one source or several, see `shoal.text.sources`) and how much of them is used.

    A source named both for training and for evaluation is shared out by documents.
    """

    train: Sources = Field(default=(PACKAGED_TEXT,), description="to calibrate, distil and choose on")
    evaluation: Sources = Field(default=(PACKAGED_TEXT,), description="to report on; the first one ranks")
    calibration_tokens: int | None = Field(default=None, ge=1, description="None: what the model's width asks for")
    evaluation_tokens: int = Field(default=16_384, ge=1, description="of each evaluation text")
    selection_tokens: int = Field(default=4_096, ge=1, description="held out from training: for choices and early stops")
    window: int = Field(default=1024, ge=8, description="tokens per window in calibration and evaluation")

    def find_calibration_tokens(self, width: int) -> int:
        """Tokens to calibrate a model of this width on: as given, or 16 per dimension and at least 32,768."""
        return self.calibration_tokens or max(32_768, 16 * width)
