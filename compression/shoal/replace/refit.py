"""The projections through which a kept unit writes into the stream, fitted again toward the teacher's stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoal.large.on_disk import keep_off_memory, weights_on_disk
from shoal.linearity.gram import Gram
from shoal.models.calls import Call
from shoal.models.projections import find_down_proj, list_projections, weight_of, width_in, width_out
from shoal.replace.fit import fit_projection
from shoal.replace.sinks import add_apart, find_all_sinks
from shoal.replace.unit_stack import Stream


@dataclass(frozen=True)
class Output:
    """A projection through which a block writes into the stream, its name in the block, and what it is multiplied by."""

    name: str
    projection: nn.Linear | Conv1D
    gain: float

    def name_weights(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """New weights [out, in] and bias as the block stores them, by their names in it."""
        stored = weight.T.contiguous() if isinstance(self.projection, Conv1D) else weight
        return {f"{self.name}.weight": stored} | ({} if bias is None else {f"{self.name}.bias": bias})


def find_output(block: nn.Module, call: Call, stream: Tensor) -> Output | None:
    """The projection that the block writes into the stream [batch, time, d] with, None if there is no single one.

    `down_proj` of a block with an MLP, `o_proj` of one with an attention alone.
    """
    width = stream.shape[-1]
    projection = find_down_proj(block, width) or _find_last(block, call, stream)
    if projection is None:
        return None
    gain = find_gain(block, projection, call, stream)
    name = next(name for name, module in block.named_modules() if module is projection)
    return None if gain is None else Output(name, projection, gain)


def _find_last(block: nn.Module, call: Call, stream: Tensor) -> nn.Linear | Conv1D | None:
    """The projection that runs last of those to the stream's width; None where something else than attention is left."""
    ran: list[nn.Linear | Conv1D] = []
    projections = [p for p in list_projections(block).values() if width_out(p) == stream.shape[-1]]
    hooks = [p.register_forward_hook(lambda module, _args, _output: ran.append(module)) for p in projections]
    try:
        call.run(block, stream)
    finally:
        for hook in hooks:
            hook.remove()
    return ran[-1] if ran else None


@torch.no_grad()
def find_gain(block: nn.Module, projection: nn.Linear | Conv1D, call: Call, stream: Tensor) -> float | None:
    """What the block multiplies the projection's output by when it adds it to the stream [batch, time, d].

    1 in most families, another number in some (Granite's `residual_multiplier`). None where the stream does not move
    by one multiple, the same for all tokens, of what the output moves by: a norm or a gate follows, or the output is
    not that of all tokens in their order (mixture of experts).
    """
    noise = torch.randn(stream.shape, generator=torch.Generator().manual_seed(0)).to(stream)
    num_calls = 0

    def add_noise(_module, _args, output: Tensor) -> Tensor | None:
        nonlocal num_calls
        num_calls += 1
        return output + noise.view_as(output) if output.numel() == noise.numel() else None

    before = call.run(block, stream)
    # Four times as long as the token's stream: then rounding of the stream hides little of it.
    noise *= 4 * before.float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-3).to(noise)
    hook = projection.register_forward_hook(add_noise)
    try:
        change = (call.run(block, stream).float() - before.float()).flatten(0, 1)
    finally:
        hook.remove()
    added = noise.float().flatten(0, 1)
    gain = (change * added).sum() / added.square().sum()
    error = ((change - gain * added).norm(dim=1) / (gain.abs() * added.norm(dim=1))).max()
    # Rounding leaves .3 % in bfloat16; a norm after the projection leaves all of the noise's length beyond its own.
    if num_calls != 1 or not float(error) < (1e-3 if stream.dtype == torch.float32 else 2e-2):  # nan neither
        return None
    return 1.0 if abs(float(gain) - 1) < 1e-3 else float(gain)


def refit(block: nn.Module, output: Output, call: Call, student: Stream, aim: Stream) -> tuple[Stream, dict[str, Tensor]]:
    """The student's stream after the block with the projection fitted toward the aim, and its new weights by name.

    Every other batch is held out to choose λ.
    """
    projection, gain, on_disk = output.projection, output.gain, weights_on_disk(block) is not None
    weight, bias = weight_of(projection), projection.bias
    gram, held = (Gram.zeros(1, width_in(projection), weight.shape[0], weight.device) for _ in range(2))
    inputs: Stream = []
    outputs: Stream = []
    hook = projection.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    try:
        for index, (batch, wanted) in enumerate(zip(student, aim, strict=True)):
            after = call.run(block, batch)
            z_btf = inputs[-1].reshape(*after.shape[:-1], -1)
            sink_n, missing_nd = find_all_sinks(batch, wanted, z_btf), ((wanted - after) / gain).flatten(0, 1)
            add_apart(held if index % 2 else gram, gram, z_btf.flatten(0, 1), missing_nd, sink_n)
            outputs.append(after)
            if on_disk:  # memory is short: the inputs, several times as wide as the stream, are computed again
                inputs.clear()
        exact, exact_bias = fit_projection(gram, weight, bias, held_out=held)
        fitted, fitted_bias = exact.to(weight), None if exact_bias is None else exact_bias.to(weight)
        change, shift = fitted - weight, 0 if fitted_bias is None else fitted_bias - bias
        for index, batch in enumerate(student):
            if on_disk:
                call.run(block, batch)
            z_btf = inputs.pop() if on_disk else inputs[index]
            outputs[index] = outputs[index] + gain * (z_btf @ change.T + shift).view_as(outputs[index])
    finally:
        hook.remove()
    return outputs, output.name_weights(keep_off_memory(fitted) if on_disk else fitted, fitted_bias)
