"""Replacements fitted in order: one walk through the stack, the student's own stream in, the teacher's stream as aim.

Each fit sees the error that earlier replacements left in the student's stream and makes up for it, which maps
fitted independently on the teacher's stream cannot (SmolLM2-135M, 6 blocks: perplexity 37 in order, 40
independently, 35 with `down_proj` of the kept blocks fitted again in the same walk). Two streams of the
calibration tokens, [N, d] each, are held; never all boundaries, and one copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.large.on_disk import in_memory
from shoal.linearity.gram import Gram
from shoal.models.calls import embed, record_calls
from shoal.models.shorten import recompute_blocks
from shoal.models.structure import find_blocks
from shoal.recipe import Kind
from shoal.replace.fit import fit_affine
from shoal.replace.maps import AffineMap, Replacement
from shoal.replace.refit import find_output, refit
from shoal.replace.sinks import add_apart, find_all_sinks
from shoal.replace.unit_stack import NUM_SAMPLED, Stream, UnitStack, find_parts
from shoal.text.windows import TokenWindows
from shoal.units import Unit, find_runs, list_places, name_units


@torch.no_grad()
def fit_in_order(
    model: PreTrainedModel,
    units: Sequence[Unit],
    windows: TokenWindows,
    *,
    kind: Kind = "linear",
    rank: int | None = None,
    ridge: float | None = None,
    refit_outputs: bool = True,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> Replacement:
    """The replacement of `units` by `kind`, fitted on `windows`; the model stays as it is.

    `linear` and `low_rank` give one affine map per run of neighbouring units; `folded` fits `down_proj` of the
    block before a run so that it does the run's work too (ReplaceMe, arXiv 2505.02819, multiplies it by a d × d
    map; the projection fitted as a whole contains that); `dropped` puts nothing there. With `refit_outputs`, `o_proj` and
    `down_proj` of every kept block after the first replaced unit are fitted again toward the teacher's stream. Kept blocks
    that scale by their place compute as they will in the shorter model. `on_progress` hears the blocks done.

    Raises ValueError if the kind does not suit the model or the units, or for a single window.
    """
    if len(windows) < 2:
        raise ValueError("a single window cannot be fitted on, as every other batch is held out: give two or more")
    replacement = Replacement(name_units(list_places(units)))
    runs = {run.start: run for run in find_runs(list_places(units))}
    if kind == "folded" and 0 in runs:
        raise ValueError("block 0 has no block before it to fold into; leave it out or choose kind='linear'")
    walk = _Walk(model, replacement.blocks, split_evenly(windows, model.device))
    if kind == "folded":
        walk.require_foldable(model, runs)
    last = 2 * len(walk.dense.blocks) if refit_outputs and runs else max((run.stop for run in runs.values()), default=0)
    place = 0
    while place < last:
        if run := runs.get(place):
            walk.pass_over(run)
            if kind in ("linear", "low_rank"):
                replacement.maps[(run.start + 1) // 2] = walk.map_across(ridge=ridge, rank=rank)
            place = run.stop
        else:
            for start, stop in walk.list_steps(place, runs, refit_outputs=refit_outputs):
                aim = runs[stop].stop if kind == "folded" and stop in runs else stop
                weights = walk.step(start, stop, aim, refit_outputs=refit_outputs)
                if weights:
                    replacement.weights.setdefault(start // 2, {}).update(weights)
                place = aim
        on_progress(place // 2)
    return replacement


class _Walk:
    """Where the teacher's and the student's streams are: the same list until the first difference."""

    def __init__(self, model: PreTrainedModel, gone: Sequence[int], batches: list[Tensor]):
        blocks, changed = find_blocks(model), recompute_blocks(model, gone)
        calls, parts = record_calls(model, batches[0]), find_parts(model, batches[0])
        self.dense = UnitStack(blocks, calls, parts)
        self.kept = UnitStack([changed.get(index, block) for index, block in enumerate(blocks)], calls, parts)
        self.sample_ids = batches[0][:1, :NUM_SAMPLED]
        self.sample_calls = record_calls(model, self.sample_ids)
        self.teacher: Stream = [embed(model, ids) for ids in batches]
        self.student = self.teacher

    def is_shared(self, block: int) -> bool:
        """Whether the student is still the teacher, this block included."""
        return self.student is self.teacher and self.kept.blocks[block] is self.dense.blocks[block]

    def pass_over(self, run: range) -> None:
        """The teacher goes through a run of units that the student has not."""
        self.teacher = self.dense.run(run.start, run.stop, self.teacher)

    def map_across(self, *, ridge: float | None, rank: int | None) -> AffineMap:
        """The map from the student's stream to the teacher's; the student has taken it."""
        affine = fit_map(self.student, self.teacher, ridge=ridge, rank=rank)
        self.student = [apply_map(affine, batch) for batch in self.student]
        return affine

    def list_steps(self, place: int, runs: dict[int, range], *, refit_outputs: bool) -> list[tuple[int, int]]:
        """From where to where, up to the end of the block or a run: parts apart where a projection is fitted after each."""
        stop = place + 1 if place % 2 or place + 1 in runs else place + 2
        can_be_apart = stop - place == 2 and self.dense.parts[place // 2] is not None
        if refit_outputs and can_be_apart and not self.is_shared(place // 2):
            return [(place, place + 1), (place + 1, stop)]
        return [(place, stop)]

    def require_foldable(self, model: PreTrainedModel, runs: Iterable[int]) -> None:
        """Raises ValueError if before a run that begins at one of these places is no projection to fold it into."""
        sample = embed(model, self.sample_ids)
        for block in (place // 2 - 1 for place in runs):
            with in_memory(self.dense.blocks[block]):
                if find_output(self.dense.blocks[block], self.sample_calls[block], sample) is None:
                    raise ValueError(
                        f"block {block} of {type(model).__name__} has no single down projection into the stream "
                        "(a norm or a gate follows it, or it is a mixture of experts); choose kind='linear'"
                    )

    def step(self, start: int, stop: int, aim: int, *, refit_outputs: bool) -> dict[str, Tensor]:
        """The student goes from `start` to `stop`, toward the teacher's stream at `aim`; what was fitted, by its name."""
        block, stay_equal = start // 2, self.is_shared(start // 2) and aim == stop
        self.teacher = self.dense.run(start, aim, self.teacher)
        if stay_equal:
            self.student = self.teacher
            return {}
        with self.kept.unit(start, stop) as kept:
            call, sample = self.kept.calls[block], self.student[0][:1, :NUM_SAMPLED]
            output = find_output(kept, self.sample_calls[block], sample) if refit_outputs or aim > stop else None
            if output is not None:
                self.student, weights = refit(kept, output, call, self.student, self.teacher)
                return weights
            self.student = [call.run(kept, batch) for batch in self.student]
        return {}


def split_evenly(windows: TokenWindows, device: torch.device) -> list[Tensor]:
    """Batches of one shape [batch, time], so that the blocks are called alike for each; two or more where it can be."""
    batch = next(size for size in (8, 4, 2, 1) if len(windows) % size == 0 and (len(windows) >= 2 * size or size == 1))
    return [ids.to(device) for ids in windows.ids.split(batch)]


def fit_map(student: Stream, aim: Stream, *, ridge: float | None = None, rank: int | None = None) -> AffineMap:
    """The affine map from the student's stream to the aim; every other batch is held out to choose λ."""
    width, device = student[0].shape[-1], student[0].device
    ordinary, sinks, held = (Gram.zeros(1, width, width, device) for _ in range(3))
    for index, (x_btd, y_btd) in enumerate(zip(student, aim, strict=True)):
        sink_n = find_all_sinks(x_btd, y_btd)
        add_apart(held if index % 2 else ordinary, sinks, x_btd.flatten(0, 1), y_btd.flatten(0, 1), sink_n)
    return fit_affine(ordinary, sinks, held_out=held, ridge=ridge, rank=rank)


def apply_map(affine: AffineMap, stream_btd: Tensor) -> Tensor:
    """The stream after the map."""
    return affine(stream_btd.flatten(0, 1)).view_as(stream_btd)
