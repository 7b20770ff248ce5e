"""Replacements fitted in order: one walk over the blocks, the student's own stream in, the teacher's stream as aim.

Each fit sees the error that earlier replacements left in the student's stream and makes up for it, which maps
fitted independently on the teacher's stream cannot (SmolLM2-135M, 6 blocks: perplexity 37 in order, 40
independently, 35 with `down_proj` of the kept blocks fitted again in the same walk). Two streams of the
calibration tokens, [N, d] each, are held; never all boundaries, and one copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal.large.on_disk import in_memory, keep_off_memory, weights_on_disk
from shoal.linearity.gram import Gram
from shoal.linearity.sinks import find_sinks, measure_norms
from shoal.models.calls import Call, embed, record_calls
from shoal.models.projections import find_down_proj, width_in
from shoal.models.shorten import recompute_blocks
from shoal.models.structure import find_blocks
from shoal.recipe import Kind
from shoal.replace.down_proj import find_gain
from shoal.replace.fit import fit_affine, fit_down_proj
from shoal.replace.maps import AffineMap, Replacement, find_runs, weight_of
from shoal.text.windows import TokenWindows

Stream = list[Tensor]  # batches [batch, time, d]


@torch.no_grad()
def fit_in_order(
    model: PreTrainedModel,
    blocks: tuple[int, ...],
    windows: TokenWindows,
    *,
    kind: Kind = "linear",
    rank: int | None = None,
    ridge: float | None = None,
    refit_down_proj: bool = True,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> Replacement:
    """The replacement of `blocks` by `kind`, fitted on `windows`; the model stays as it is.

    `linear` and `low_rank` give one affine map per run of neighbouring blocks; `folded` fits `down_proj` of the
    block before a run so that it does the run's work too (ReplaceMe, arXiv 2505.02819, multiplies it by a d × d
    map; the projection fitted as a whole contains that); `dropped` puts nothing there. With `refit_down_proj`,
    `down_proj` of every kept block after the first replaced one is fitted again toward the teacher's stream. Kept blocks
    that scale by their place compute as they will in the shorter model. `on_progress` hears the blocks done.

    Raises ValueError if the kind does not suit the model or the blocks, or for a single window.
    """
    if len(windows) < 2:
        raise ValueError("a single window cannot be fitted on, as every other batch is held out: give two or more")
    decoder = find_blocks(model)
    runs = {run.start: run for run in find_runs(blocks)}
    if kind == "folded" and 0 in runs:
        raise ValueError("block 0 has no block before it to fold into; leave it out or choose kind='linear'")
    changed = recompute_blocks(model, blocks)
    batches = split_evenly(windows, model.device)
    calls = record_calls(model, batches[0])
    teacher: Stream = [embed(model, ids) for ids in batches]
    if kind == "folded":
        _require_foldable(model, runs, calls, teacher[0])
    student: Stream = teacher
    replacement = Replacement(blocks=tuple(sorted(blocks)))
    last = len(decoder) if refit_down_proj and blocks else max(blocks, default=-1) + 1
    block = 0
    while block < last:
        run = runs.get(block)
        if run is not None:
            teacher = advance(decoder, calls, run, teacher)
            if kind in ("linear", "low_rank"):
                replacement.maps[run.start] = _fit_map(student, teacher, ridge=ridge, rank=rank)
                student = [_apply(replacement.maps[run.start], stream) for stream in student]
            block = run.stop
        else:
            stop = block + 1
            if kind == "folded" and stop in runs:
                stop = runs[stop].stop
            kept = changed.get(block, decoder[block])
            shared = student is teacher and block not in changed
            with in_memory(decoder[block]), in_memory(kept):
                aim = advance(decoder, calls, range(block, stop), teacher)
                wanted = stop > block + 1 or (refit_down_proj and not shared)
                found = _find_refittable(kept, calls[block], student[0]) if wanted else None
                if found is not None:
                    student, weight, bias = _refit_block(kept, *found, calls[block], student, aim)
                    replacement.down_proj[block] = weight
                    if bias is not None:
                        replacement.down_bias[block] = bias
                else:
                    student = aim if shared else [calls[block].run(kept, batch) for batch in student]
            teacher, block = aim, stop
        on_progress(block)
    return replacement


def split_evenly(windows: TokenWindows, device: torch.device) -> list[Tensor]:
    """Batches of one shape [batch, time], so that the blocks are called alike for each; two or more where it can be."""
    batch = next(size for size in (8, 4, 2, 1) if len(windows) % size == 0 and (len(windows) >= 2 * size or size == 1))
    return [ids.to(device) for ids in windows.ids.split(batch)]


def advance(decoder: nn.ModuleList, calls: list[Call], blocks: range, stream: Stream) -> Stream:
    for block in blocks:
        with in_memory(decoder[block]):
            stream = [calls[block].run(decoder[block], batch) for batch in stream]
    return stream


def _fit_map(student: Stream, aim: Stream, *, ridge: float | None, rank: int | None) -> AffineMap:
    """The affine map from the student's stream to the aim; every other batch is held out to choose λ."""
    width, device = student[0].shape[-1], student[0].device
    ordinary, sinks, held = (Gram.zeros(1, width, width, device) for _ in range(3))
    for index, (x_btd, y_btd) in enumerate(zip(student, aim, strict=True)):
        sink_n = _find_all_sinks(x_btd, y_btd)
        _add_apart(held if index % 2 else ordinary, sinks, x_btd.flatten(0, 1), y_btd.flatten(0, 1), sink_n)
    return fit_affine(ordinary, sinks, held_out=held, ridge=ridge, rank=rank)


def _find_all_sinks(*streams_btd: Tensor) -> Tensor:
    """Which tokens [N] are sinks in any of the streams."""
    return torch.stack([find_sinks(measure_norms(stream)[1]) for stream in streams_btd]).any(0)


def _add_apart(ordinary: Gram, sinks: Gram, x_nd: Tensor, y_ne: Tensor, sink_n: Tensor) -> None:
    sinks.add(0, x_nd[sink_n], y_ne[sink_n])
    ordinary.add(0, x_nd.masked_fill(sink_n[:, None], 0), y_ne, ~sink_n)


def _apply(affine: AffineMap, stream_btd: Tensor) -> Tensor:
    return affine(stream_btd.flatten(0, 1)).view_as(stream_btd)


def _find_refittable(block: nn.Module, call: Call, stream: Tensor) -> tuple[nn.Linear | Conv1D, float] | None:
    """The block's `down_proj` and what its output is multiplied by on its way into the stream; None if it has neither."""
    projection = find_down_proj(block, stream.shape[-1])
    gain = None if projection is None else find_gain(block, projection, call, stream)
    return None if projection is None or gain is None else (projection, gain)


def _refit_block(
    block: nn.Module, projection: nn.Linear | Conv1D, gain: float, call: Call, student: Stream, aim: Stream
) -> tuple[Stream, Tensor, Tensor | None]:
    """The student's stream after the block with `down_proj` fitted toward the aim; its new weight [out, in] and bias.

    Every other batch is held out to choose λ. The block multiplies what the projection makes by `gain`.
    """
    weight, bias, on_disk = weight_of(projection), projection.bias, weights_on_disk(block) is not None
    gram, held = (Gram.zeros(1, width_in(projection), weight.shape[0], weight.device) for _ in range(2))
    inputs: Stream = []
    outputs: Stream = []
    hook = projection.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    try:
        for index, (batch, wanted) in enumerate(zip(student, aim, strict=True)):
            output = call.run(block, batch)
            z_btf = inputs[-1].reshape(*output.shape[:-1], -1)
            sink_n, missing_nd = _find_all_sinks(batch, wanted, z_btf), ((wanted - output) / gain).flatten(0, 1)
            _add_apart(held if index % 2 else gram, gram, z_btf.flatten(0, 1), missing_nd, sink_n)
            outputs.append(output)
            if on_disk:  # memory is short: the inputs, several times as wide as the stream, are computed again
                inputs.clear()
        exact, exact_bias = fit_down_proj(gram, weight, bias, held_out=held)
        fitted, fitted_bias = exact.to(weight), None if exact_bias is None else exact_bias.to(weight)
        change, shift = fitted - weight, 0 if fitted_bias is None else fitted_bias - bias
        for index, batch in enumerate(student):
            if on_disk:
                call.run(block, batch)
            z_btf = inputs.pop() if on_disk else inputs[index]
            outputs[index] = outputs[index] + gain * (z_btf @ change.T + shift).view_as(outputs[index])
    finally:
        hook.remove()
    return outputs, keep_off_memory(fitted) if on_disk else fitted, fitted_bias


def _require_foldable(model: PreTrainedModel, runs: dict[int, range], calls: list[Call], stream: Tensor) -> None:
    for start in runs:
        if _find_refittable(find_blocks(model)[start - 1], calls[start - 1], stream) is None:
            raise ValueError(
                f"block {start - 1} of {type(model).__name__} has no single down projection into the stream "
                "(a norm or a gate follows it, or it is a mixture of experts); choose kind='linear'"
            )
