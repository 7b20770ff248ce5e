"""Rows as they are written: of local files (.jsonl, .json, .parquet; .txt as one text), packed or not, and of the Hub.

What cannot be read as it was meant is refused by name, with the cause: no byte is replaced, no path is taken for a pattern.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO, cast

from shoal.files import require_path
from shoal.texts import PACKAGED_TEXT, PACKED, TEXT_FORMATS, text_format

Row = dict[str, Any]

BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip
ROWS_AT_ONCE = 1000


def read_text(path: Path) -> str:
    """All of a text file. Raises ValueError if it is not there, or is no text."""
    with open_text(path) as file:
        return file.read()


def read_rows(source: str) -> Iterator[Row]:
    """The rows of a .jsonl, .json or .parquet file, or of a Hub dataset (`name`, `name:config`, `name:config@split`).

    Labels of a known set of classes are given by name. Raises ValueError for a source that is not there or cannot be read,
    in part only as its rows are taken.
    """
    require_path(source, "data")
    kind = text_format(source)
    if kind == ".txt":
        raise ValueError(f"{source!r} is plain text, and rows are needed: give .jsonl, .parquet or a Hub dataset")
    if kind == ".parquet":
        return _read_parquet(_find(Path(source)))
    return _read_json(_find(Path(source))) if kind else _read_dataset(source)


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The file unpacked, as text: UTF-8, or what its byte order mark says.

    Raises ValueError for other encodings and damaged files.
    """
    try:
        with _unpack(_find(path)) as file:
            head = file.read(4096)
        with _unpack(path) as file:
            yield io.TextIOWrapper(file, encoding=_find_encoding(path, head))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {str(path)!r} is not {error.encoding.upper()} ({error.reason} {error.object[error.start]:#04x}); "
            "save it as UTF-8: iconv -f latin1 -t utf-8"
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:  # no fault of what is in the file
            raise
        raise ValueError(f"text file {str(path)!r} is damaged: {error}") from error


def _find(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"text {str(path)!r} is a folder; name a file in it")
    if not path.is_file():
        raise ValueError(f"text file {str(path)!r} does not exist; check the path")
    return path


def _unpack(path: Path) -> IO[bytes]:
    """By what the file begins with, whatever its name says."""
    with path.open("rb") as file:
        head = file.read(6)
    if head.startswith(b"\x1f\x8b"):
        return cast("IO[bytes]", gzip.open(path))
    if head.startswith(b"BZh"):
        return cast("IO[bytes]", bz2.open(path))
    if head.startswith(b"\xfd7zXZ\x00"):
        return cast("IO[bytes]", lzma.open(path))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return path.open("rb")


def _find_encoding(path: Path, head: bytes) -> str:
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    if b"\x00" in head:
        raise ValueError(
            f"text file {str(path)!r} is no text: it holds zero bytes; if it is UTF-16, save it as UTF-8: "
            "iconv -f utf-16 -t utf-8"
        )
    return "utf-8"


def _read_json(path: Path) -> Iterator[Row]:
    """The objects of a file that has one a line, or is a list of them."""
    with open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
        if first.lstrip().startswith("["):
            yield from (
                _require_row(path, number, row) for number, row in enumerate(_parse(path, 1, first + file.read()), 1)
            )
            return
        for number, line in enumerate(itertools.chain([first], file), 1):
            if line.strip():
                yield _require_row(path, number, _parse(path, number, line))


def _parse(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r}, line {number}, is no JSON: {error}; there is to be one object a line") from error


def _require_row(path: Path, number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{str(path)!r}, row {number}, is {str(row)[:60]!r}, and no object with named fields")
    return row


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from datasets import Features
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            labels = _find_labels(Features.from_arrow_schema(file.schema_arrow))
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield from (_name_labels(row, labels) for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"data file {str(path)!r} is damaged or no .parquet: {explain(error)}") from error


def _read_dataset(source: str) -> Iterator[Row]:
    if Path(source).is_file():
        raise ValueError(
            f"text file {source!r} is of no kind that can be read: those are {', '.join(TEXT_FORMATS)}, also packed as "
            f"{', '.join(PACKED)}; rename or convert it"
        )
    from datasets import load_dataset

    name, _, split = source.partition("@")
    name, _, config = name.partition(":")
    if Path(name).is_dir() and glob.has_magic(name):
        raise ValueError(f"the path of the folder {name!r} would be taken for a pattern; rename it, without any of [ * ?")
    try:
        dataset = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # whatever the network, the Hub, a builder or the data bring up
        raise ValueError(
            f"cannot load text {source!r}: it is not {PACKAGED_TEXT!r}, no local file ({', '.join(TEXT_FORMATS)}, perhaps "
            f"packed), and not a dataset that the Hub (or its cache) gives: {explain(error)}"
        ) from error
    if dataset.info.builder_name == "text":
        raise ValueError(f"{source!r} holds plain text files, whose lines would be rows; give the .txt file itself")
    # Pictures and sounds would be decoded row by row.
    kinds = {column: type(feature).__name__ for column, feature in dataset.features.items()}
    dataset = dataset.remove_columns([column for column in kinds if kinds[column] in ("Audio", "Image", "Video", "Pdf")])
    labels = _find_labels(dataset.features)
    for batch in dataset.iter(ROWS_AT_ONCE):
        columns = list(batch)
        yield from (_name_labels(dict(zip(columns, row, strict=True)), labels) for row in zip(*batch.values(), strict=True))


def _find_labels(features: Any) -> dict[str, list[str]]:
    return {name: feature.names for name, feature in features.items() if type(feature).__name__ == "ClassLabel"}


def _name_labels(row: Row, labels: dict[str, list[str]]) -> Row:
    """Rows without a label are marked by None or −1."""
    for name, classes in labels.items():
        row[name] = classes[row[name]] if row[name] is not None and row[name] >= 0 else None
    return row


def explain(error: BaseException) -> str:
    """What an error says and what was at its root, in one line: loaders wrap the cause in words that say nothing."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    said = [" ".join(str(one).split()) or type(one).__name__ for one in (error, root)]
    return ": ".join(dict.fromkeys(said))[:600]
