"""Units that may leave a stack of blocks: a block, or the attention or the MLP of one. How they are named and counted.

A unit is named by its block, 12, or by a part of it, "12.attention" or "12.mlp". A place is a number of parts from the
stack's beginning: place 2·b is boundary b, and place 2·b + 1 lies between the attention and the MLP of block b.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PARTS = ("attention", "mlp")
Unit = int | str


def read_unit(name: object) -> Unit:
    """A block's index, or the name of a part of it. Raises ValueError for anything else."""
    found = None if isinstance(name, bool) else re.fullmatch(r"(\d+)(?:\.(\w+))?", str(name).strip())
    if found is None or found[2] not in (None, *PARTS):
        raise ValueError(f"unit {name!r} is no block: give its index, as 12, or a part of it, as 12.attention or 12.mlp")
    return f"{int(found[1])}.{found[2]}" if found[2] else int(found[1])


def whole_blocks(units: Iterable[Unit]) -> tuple[int, ...]:
    """The units that are blocks."""
    return tuple(unit for unit in units if isinstance(unit, int))


def list_places(units: Iterable[Unit]) -> list[int]:
    """The places that the units begin at, in order: a block is two."""
    places = set()
    for unit in units:
        block, _, part = str(unit).partition(".")
        places |= {2 * int(block) + PARTS.index(part)} if part else {2 * int(block), 2 * int(block) + 1}
    return sorted(places)


def name_units(places: Iterable[int]) -> tuple[Unit, ...]:
    """The units at these places; both units of a block are the block."""
    gone = set(places)
    units: list[Unit] = []
    for place in sorted(gone):
        block, part = divmod(place, 2)
        if part == 0 and place + 1 in gone:
            units.append(block)
        elif part == 0 or place - 1 not in gone:
            units.append(f"{block}.{PARTS[part]}")
    return tuple(units)


def find_runs(places: Iterable[int]) -> list[range]:
    """Neighbouring places together, in order: (5, 12, 13) → [5..5], [12..13]. Of blocks likewise."""
    runs: list[range] = []
    for place in sorted(set(places)):
        if runs and runs[-1].stop == place:
            runs[-1] = range(runs[-1].start, place + 1)
        else:
            runs.append(range(place, place + 1))
    return runs
