"""How much of a projection's output arrives in the stream that its block returns: found by trying, not by names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoal.large.on_disk import in_memory
from shoal.models.calls import Call


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

    with in_memory(block):
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
