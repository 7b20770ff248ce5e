"""What is printed for people: as it is, whole at any width, and without passwords."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

# What stands in square brackets or between colons in names and paths is theirs, and no markup.
console = Console(stderr=True, highlight=False, markup=False, emoji=False)
output = Console(highlight=False, markup=False, emoji=False)

# Text columns become no narrower than this, where the terminal is.
MIN_TEXT_WIDTH = 8
# After `user:` up to the last @ of the word, and no port with a path; and what queries are given.
PASSWORDS = (
    (re.compile(r"(?<=://)([^\s/@:]*):(?!\d+/)\S*@"), r"\1:***@"),
    (re.compile(r"(?i)([?&;](?:password|pwd|token|secret|access_key|api_key)=)[^&;\s'\"]+"), r"\1***"),
)


def mask_passwords(text: str) -> str:
    """The text with `***` for the password of every `scheme://user:password@host`."""
    for pattern, masked in PASSWORDS:
        text = pattern.sub(masked, text)
    return text


def say(text: str) -> None:
    """Lines on the error output that can be copied: never broken, whatever the width."""
    console.print(mask_passwords(text), soft_wrap=True)


def show(table: Table, *, to: Console = output) -> None:
    """The table; where the terminal is too narrow for its numbers, its rows below each other, a line for each value."""
    if _measure(table, to) > to.width:
        spare = _narrow(table)
        if _measure(table, to) - spare > to.width:
            _show_rows(table, to)
            return
    to.print(table)


def _measure(table: Table, to: Console) -> int:
    """The width that the table would like to have."""
    return table.__rich_measure__(to, to.options.update(max_width=10_000)).maximum


def _narrow(table: Table) -> int:
    """Headers break between words, texts anywhere, numbers nowhere; returns how much narrower texts can become."""
    table.padding = 0
    spare = 0
    for column in table.columns:
        widest = max([_widest_line(cell) for cell in column.cells], default=0)
        if column.justify == "right" or column.no_wrap:
            column.width = max(widest, _widest_word(column.header))
        else:
            column.min_width, column.overflow = min(widest, MIN_TEXT_WIDTH), "fold"
            spare += max(widest, _widest_line(column.header)) - max(column.min_width, _widest_word(column.header))
    return spare


def _show_rows(table: Table, to: Console) -> None:
    if table.title:
        to.print(table.title, style="italic")
    labels = [_plain(column.header) for column in table.columns]
    margin = max(map(cell_len, labels)) + 2
    for row in zip(*(column.cells for column in table.columns), strict=True):
        to.print()
        for label, cell in zip(labels, row, strict=True):
            for number, line in enumerate(_plain(cell).splitlines()):
                name = label if number == 0 else ""
                to.print(Text(f"{name}{' ' * (margin - cell_len(name))}{line}"), overflow="fold")
    if table.caption:
        to.print()
        to.print(table.caption, style="dim")


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def _widest_line(cell: object) -> int:
    return max(map(cell_len, _plain(cell).splitlines()), default=0)


def _widest_word(header: object) -> int:
    return max(map(cell_len, _plain(header).split()), default=0)


def quote(*words: object) -> str:
    """A command that can be pasted into a shell."""
    return shlex.join(map(str, words))


def name_of(model: str) -> str:
    """A model's name for files: the last part of its folder, wherever that is (`.` too), of its file or of its Hub id."""
    path = Path(model)
    return (path.resolve().name if path.exists() else path.name) or "model"
