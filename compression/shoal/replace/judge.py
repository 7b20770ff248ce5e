"""What it costs to be without units: the divergence from the dense model, with one map in the place of each run.

Maps are fitted on the dense model's own streams, and nothing is fitted again: that ranks as the walk in order does, and
takes a fraction of it (SmolLM2-135M: 0.4 s a map against 150 s a walk). What candidates share is kept: the dense streams at
every place, the maps by their first and last place, and every cost that was asked for before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.large.memory import MAX_STREAM_BYTES
from shoal.large.on_disk import zeros_off_memory
from shoal.measure.divergence import find_divergence, find_normalizer
from shoal.measure.targets import TeacherTargets
from shoal.models.calls import embed, find_logits, record_calls
from shoal.models.structure import find_blocks
from shoal.recipe import Recipe
from shoal.replace.in_order import apply_map, fit_map, split_evenly
from shoal.replace.maps import AffineMap
from shoal.replace.unit_stack import Stream, UnitStack, find_parts
from shoal.text.windows import TokenWindows
from shoal.units import find_runs

# Of the calibration text: enough to rank maps by.
MAX_FIT_TOKENS = 16_384
# A first look at a candidate takes this many tokens of so many windows.
QUICK_TOKENS, QUICK_WINDOWS = 512, 2

Places = frozenset[int]


@dataclass(frozen=True)
class _Reading:
    """Windows of selection text with the dense model's streams at every place, how blocks are called, and its targets."""

    ids: Tensor
    streams: list[Stream]
    stack: UnitStack
    rows: slice


class Judge:
    """The divergence in nats per token of the model without given units, on selection text."""

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, calibration: TokenWindows, selection: TokenWindows, dense: TeacherTargets,
        recipe: Recipe,
    ):  # fmt: skip
        dense.require(selection)
        self.model, self.dense, self.recipe = model, dense, recipe
        self.parts = find_parts(model, selection.ids.to(model.device))
        few = calibration.take(0, max(2, min(len(calibration), MAX_FIT_TOKENS // calibration.ids.shape[1])))
        batches = split_evenly(few, model.device)
        self.streams = self._keep_streams(self._stack(batches[0]), batches)
        quick = selection.ids[:QUICK_WINDOWS, :QUICK_TOKENS]
        self.quick = [self._read(quick.to(model.device), slice(0, len(quick)))]
        self.whole = [self._read(ids[None].to(model.device), slice(row, row + 1)) for row, ids in enumerate(selection.ids)]
        self.maps: dict[tuple[int, int], AffineMap] = {}
        self.costs: dict[tuple[Places, bool], float] = {}

    def _stack(self, ids: Tensor) -> UnitStack:
        return UnitStack(find_blocks(self.model), record_calls(self.model, ids), self.parts)

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

    @torch.no_grad()
    def cost(self, places: Places, *, quick: bool = False) -> float:
        """The mean divergence without the units at these places; `quick`, on a few of the tokens."""
        if (places, quick) not in self.costs:
            readings = self.quick if quick else self.whole
            kl = torch.cat([self._read_kl(places, reading).flatten() for reading in readings])
            self.costs[places, quick] = float(kl.mean())
        return self.costs[places, quick]

    def _read_kl(self, places: Places, reading: _Reading) -> Tensor:
        runs = {run.start: run for run in find_runs(places)}
        place = min(runs)
        stream, depth = reading.streams[place], 2 * len(reading.stack.blocks)
        while place < depth:
            if run := runs.get(place):
                stream, place = self._cross(run, stream), run.stop
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


def _off_memory(batch: Tensor) -> Tensor:
    return zeros_off_memory(*batch.shape, dtype=batch.dtype).copy_(batch) if batch.device.type == "cpu" else batch
