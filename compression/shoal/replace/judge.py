"""What it costs to be without units: the divergence from the dense model, with one map in the place of each run.

To choose, maps are fitted on the dense model's own streams, and nothing is fitted again: that takes a fraction of the walk
in order. What candidates share is kept: the dense streams at every place, the maps by their first and last place, and every
cost that was asked for before. The walk, on few tokens, decides between the last few, since refits help one set more than
another (SmolLM2-135M, 4 blocks: 15–18 cost .242, and .183 after the walk, 12–15 .275 and .173); it puts them in the order
that a walk on eight times the tokens does.

Where there is a process group (`torch.distributed`), its ranks look at candidates side by side: all search alike, each
finds its share of the costs, and all know all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from shoal.files import write_text
from shoal.large.memory import MAX_STREAM_BYTES
from shoal.large.on_disk import zeros_off_memory
from shoal.measure.divergence import find_divergence, find_normalizer
from shoal.measure.targets import TeacherTargets
from shoal.models.calls import embed, find_logits, record_calls
from shoal.models.structure import find_blocks
from shoal.recipe import Recipe
from shoal.replace.in_order import apply_map, fit_in_order, fit_map, split_evenly
from shoal.replace.maps import AffineMap, Replacement
from shoal.replace.unit_stack import Stream, UnitStack, find_parts
from shoal.text.windows import TokenWindows
from shoal.units import find_runs, name_units
from shoal.value import fingerprint

# Of the calibration text: enough to rank by.
MAX_FIT_TOKENS = 8_192
# A first look at a candidate takes this many tokens of so many windows.
QUICK_TOKENS, QUICK_WINDOWS = 512, 2

T = TypeVar("T")
Places = frozenset[int]
Cross = Callable[[range, Stream], Stream]


@dataclass(frozen=True)
class _Reading:
    """Windows of selection text with the dense model's streams at every place, how blocks are called, and its targets."""

    ids: Tensor
    streams: list[Stream]
    stack: UnitStack
    rows: slice


class Judge:
    """The divergence in nats per token of the model without given units, on selection text.

    `kept_in`: a folder where costs are kept, for choices of the same model and texts that come after this one.
    """

    def __init__(
        self, model: PreTrainedModel, calibration: TokenWindows, selection: TokenWindows, dense: TeacherTargets,
        recipe: Recipe, *, kept_in: Path | None = None,
    ):  # fmt: skip
        dense.require(selection)
        self.model, self.selection, self.dense, self.recipe = model, selection, dense, recipe
        self.parts = find_parts(model, selection.ids.to(model.device))
        self.few = calibration.take(0, max(2, min(len(calibration), MAX_FIT_TOKENS // calibration.ids.shape[1])))
        self.maps: dict[tuple[int, int], AffineMap] = {}
        stands_there = "nothing" if recipe.kind == "dropped" else f"map-{fingerprint([recipe.rank, recipe.ridge])}"
        self.file = kept_in and kept_in / f"costs-{stands_there}.json"
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # One rank's: another trial may write the file while the ranks read it, and all must search alike.
        self.costs = dict(self._gather([_read_costs(self.file)])[0])

    @cached_property
    def streams(self) -> list[Stream]:
        """The dense model's at every place, of the calibration text that maps are fitted on."""
        batches = split_evenly(self.few, self.model.device)
        return self._keep_streams(self._stack(batches[0]), batches)

    @cached_property
    def quick(self) -> list[_Reading]:
        few = self.selection.ids[:QUICK_WINDOWS, :QUICK_TOKENS].to(self.model.device)
        return [self._read(few, slice(0, len(few)))]

    @cached_property
    def whole(self) -> list[_Reading]:
        rows = enumerate(self.selection.ids.to(self.model.device))
        return [self._read(ids[None], slice(row, row + 1)) for row, ids in rows]

    def cost(self, places: Places, *, quick: bool = False) -> float:
        """The mean divergence without the units at these places; `quick`, on a few of the tokens. Every rank asks alike."""
        self.read([places], quick=quick)
        return self.costs[places, quick]

    def read(self, candidates: Iterable[Places], *, quick: bool = False) -> None:
        """Finds the costs of all of these; every rank asks alike, and finds its share of them."""
        unknown = sorted({places for places in candidates if (places, quick) not in self.costs}, key=sorted)
        own = unknown[self.rank :: self.world_size]
        for places, cost in self._gather([(places, self._find_cost(places, quick)) for places in own]):
            self.costs[places, quick] = cost

    def read_in_order(self, finalists: Sequence[Places]) -> list[float]:
        """The mean divergence of each with the recipe's own kind in place, fitted in order on few tokens."""
        own = range(self.rank, len(finalists), self.world_size)
        costs = dict(self._gather([(index, self._find_cost_in_order(finalists[index])) for index in own]))
        return [costs[index] for index in range(len(finalists))]

    def _gather(self, own: list[T]) -> list[T]:
        """What every rank has, the first rank's first."""
        parts = [own] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(parts, own)
        return [item for part in parts for item in part]

    @torch.no_grad()
    def _find_cost(self, places: Places, quick: bool) -> float:
        readings = self.quick if quick else self.whole
        kl = torch.cat([self._read_kl(places, reading, self._cross).flatten() for reading in readings])
        return float(kl.mean())

    @torch.no_grad()
    def _find_cost_in_order(self, places: Places) -> float:
        recipe = self.recipe
        fitted = fit_in_order(
            self.model, name_units(places), self.few, kind=recipe.kind, rank=recipe.rank, ridge=recipe.ridge,
            refit_outputs=recipe.refit,
        )  # fmt: skip

        def cross(run: range, stream: Stream) -> Stream:
            affine = fitted.maps.get((run.start + 1) // 2)
            return stream if affine is None else [apply_map(affine, batch) for batch in stream]

        first = min(fitted.weights, default=len(self.parts))
        with _with_weights(self.model, fitted):
            kl = [self._read_kl(places, reading, cross, first=2 * first).flatten() for reading in self.whole]
        return float(torch.cat(kl).mean())

    def remember(self) -> None:
        """Keeps the costs for choices that come after this one."""
        if self.file and self.rank == 0:
            self.costs = _read_costs(self.file) | self.costs
            rows = [[sorted(places), quick, cost] for (places, quick), cost in self.costs.items()]
            write_text(self.file, json.dumps(rows))

    def _stack(self, ids: Tensor) -> UnitStack:
        return UnitStack(find_blocks(self.model), record_calls(self.model, ids), self.parts)

    @torch.no_grad()
    def _keep_streams(self, stack: UnitStack, batches: list[Tensor]) -> list[Stream]:
        """The dense model's streams at every place, [2 · depth + 1] of batches; where parts are not apart, the block's."""
        stream = [embed(self.model, ids) for ids in batches]
        num_places = 2 * len(stack.blocks) + 1
        large = num_places * sum(batch.nbytes for batch in stream) > MAX_STREAM_BYTES
        kept: list[Stream] = []
        for place in range(num_places):
            kept.append([_off_memory(batch) for batch in stream] if large else stream)
            if place + 1 < num_places:
                if self.parts[place // 2] is not None:
                    stream = stack.run(place, place + 1, stream)
                elif place % 2:
                    stream = stack.run(place - 1, place + 1, stream)
        return kept

    def _read(self, ids: Tensor, rows: slice) -> _Reading:
        stack = self._stack(ids)
        return _Reading(ids, self._keep_streams(stack, [ids]), stack, rows)

    def _read_kl(self, places: Places, reading: _Reading, cross: Cross, *, first: int | None = None) -> Tensor:
        """Of each token but a window's last; `first` is a place behind which blocks have other weights."""
        runs = {run.start: run for run in find_runs(places)}
        place = min([*runs, *([] if first is None else [first])])
        stream, depth = reading.streams[place], 2 * len(reading.stack.blocks)
        while place < depth:
            if run := runs.get(place):
                stream, place = cross(run, stream), run.stop
            else:
                stop = min((start for start in runs if start > place), default=depth)
                stream, place = reading.stack.run(place, stop, stream), stop
        logits = find_logits(self.model, reading.ids, stream[0], reading.stack.calls)
        top = self.dense.top_tokens(reading.rows, logits.device)
        top = type(top)(*(values[:, : logits.shape[1]] for values in top))
        log_probs = logits.gather(-1, top.ids).float() - find_normalizer(logits)[0][..., None]
        return find_divergence(log_probs, top)[:, :-1].double()

    def _cross(self, run: range, stream: Stream) -> Stream:
        """The stream behind a run: through its map, or as it is where nothing will stand there."""
        if self.recipe.kind == "dropped":
            return stream
        key = run.start, run.stop
        if key not in self.maps:
            student, aim = self.streams[run.start], self.streams[run.stop]
            self.maps[key] = fit_map(student, aim, ridge=self.recipe.ridge, rank=self.recipe.rank)
        return [apply_map(self.maps[key], batch) for batch in stream]


def _read_costs(file: Path | None) -> dict[tuple[Places, bool], float]:
    if file is None or not file.exists():
        return {}
    return {(frozenset(places), quick): cost for places, quick, cost in json.loads(file.read_text())}


@contextmanager
def _with_weights(model: PreTrainedModel, fitted: Replacement) -> Iterator[None]:
    """Inside, kept blocks compute with the fitted weights."""
    blocks = find_blocks(model)
    changed = [(blocks[i].get_parameter(name), new) for i, own in fitted.weights.items() for name, new in own.items()]
    before = [parameter.data for parameter, _ in changed]
    for parameter, new in changed:
        parameter.data = new.to(parameter)
    try:
        yield
    finally:
        for (parameter, _), old in zip(changed, before, strict=True):
            parameter.data = old


def _off_memory(batch: Tensor) -> Tensor:
    return zeros_off_memory(*batch.shape, dtype=batch.dtype).copy_(batch) if batch.device.type == "cpu" else batch
