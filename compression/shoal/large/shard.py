"""A model's weights spread over the ranks (FSDP2): each holds its share of every block, and gathers a block to use it.

For models larger than a rank's memory: they come with their blocks on disk (`on_disk`), and are read, changed and spread
a block at a time. What is learned is what one rank with the whole model learns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from shoal.large.on_disk import put_weight, take_off_disk
from shoal.models.structure import find_blocks


class Shards:
    """The ranks, as places for shares of weights. Raises ValueError where there is no process group."""

    def __init__(self, device: torch.device):
        if not dist.is_initialized():
            raise ValueError(
                "a streamed model is trained by several workers that share its weights: distil it in a search with "
                "run.streamed, or where it fits in memory"
            )
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    @contextmanager
    def of(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module's weights are in memory as a whole; after it, each rank has its share of them.

        Blocks come first, and the model, with what is left, last.
        """
        take_off_disk(module)
        yield
        # By default, what is outside the blocks would stay gathered after a check, and not hear of new weights.
        sharded = fully_shard(module, mesh=self.mesh, reshard_after_forward=True)
        # Descent's losses are weighted so that gradients are summed, not averaged; gloo knows no scaled sum.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """The frozen model, whose blocks are on disk, spread over the ranks in place."""
    shards = Shards(model.device)
    for module in [*find_blocks(model), model]:
        with shards.of(module):
            pass
    return model


@torch.no_grad()
def collect(sharded: PreTrainedModel, student: PreTrainedModel, merge: Callable[[nn.Module], list[str]]) -> None:
    """Puts what has changed in a sharded student into the one on disk that it is a copy of: on rank 0, and there alone.

    `merge` makes plain modules of a whole block's, and names the weights that it changed. Every rank calls this.
    """
    pairs = [*zip(find_blocks(sharded), find_blocks(student), strict=True), (sharded, student)]
    for source, place in pairs:
        assert isinstance(source, FSDPModule)
        changed = {name for name, parameter in source.named_parameters() if parameter.requires_grad}
        source.unshard()
        changed.update(merge(source))
        for name, parameter in source.named_parameters():
            # Of the model, what is not in the blocks: those hold shares again.
            if name in changed and not is_sharded(parameter) and dist.get_rank() == 0:
                put_weight(place, name, parameter.detach())
        source.reshard()
    student.tie_weights()


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds its share of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of the tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensor: Tensor) -> Tensor:
    """All of the tensor in the computer's memory; of a shared one on rank 0 alone, and nothing [0] on the others."""
    collected = whole(tensor.detach())
    return torch.empty(0) if is_sharded(tensor) and dist.get_rank() else collected.to("cpu", copy=True)


def share_like(like: Tensor, collected: Tensor) -> Tensor:
    """What `gather` gave, held as `like` is: this rank's share of it, where that is shared."""
    if not isinstance(like, DTensor) or collected.shape != like.shape:
        return collected
    # Every rank has it all, so none has to send.
    return distribute_tensor(collected.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
