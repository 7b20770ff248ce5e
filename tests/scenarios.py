"""What scripts of faults and loads have in common: scenarios chosen by name, a table of rows, an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Row(NamedTuple):
    """A line of the table."""

    done: str
    came: str
    bound: str
    held: bool


def parse_choice(
    parser: argparse.ArgumentParser, scenarios: Sequence[Callable[..., list[Row]]]
) -> tuple[argparse.Namespace, list[Callable[..., list[Row]]]]:
    """What the command line gives, and the scenarios that it names: all if it names none."""
    names = [scenario.__name__ for scenario in scenarios]
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(names)}; by default all")
    given = parser.parse_args()
    if unknown := sorted(set(given.scenarios) - set(names)):
        parser.error(f"unknown scenarios {unknown}; there are {names}")
    return given, [scenario for scenario in scenarios if scenario.__name__ in (given.scenarios or names)]


def print_rows(title: str, came: str, rows: Iterable[Row]) -> None:
    """Prints each row as it comes, and all as a table; exits with 1 if a bound is broken. `came`: a column's heading."""
    table = Table(title=title)
    for column in ("what was done", came, "bound", "held"):
        table.add_column(column)
    broken = False
    for row in rows:
        table.add_row(row.done, row.came, row.bound, "yes" if row.held else "NO")
        print(f"{row.done}: {row.came} (bound: {row.bound}){'' if row.held else ' BROKEN'}", file=sys.stderr, flush=True)
        broken |= not row.held
    Console(width=150).print(table)
    sys.exit(broken)
