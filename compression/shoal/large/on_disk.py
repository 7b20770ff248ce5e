"""A model whose blocks stay on disk: each is in memory only while it is used.

Transformers finds every weight in the model's own files, whatever it is called there, and the files are never copied.
A whole forward pass works as with any model, and reads all blocks; `in_memory` keeps one for several calls.
"""

from __future__ import annotations

import atexit
import copy
import functools
import logging
import shutil
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, set_module_tensor_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.models.structure import find_blocks


class WeightsOnDisk:
    """The weights of a block: in memory inside `with`, on the meta device outside.

    A block carries it as `_hf_hook`: there transformers looks for weights when it saves a model shard by shard.
    """

    def __init__(self, block: nn.Module, on_disk: Mapping[str, Tensor], device: torch.device):
        self.block, self.device, self.num_users = block, device, 0
        self.names = [name for name, _ in block.named_parameters()]
        # What is put into the map covers what is on disk.
        self.weights_map: ChainMap[str, Tensor] = ChainMap({}, on_disk)  # type: ignore[arg-type]
        block._hf_hook = self  # type: ignore[assignment]
        self.hooks = (
            block.register_forward_pre_hook(lambda block, _args: block._hf_hook.__enter__() and None),
            block.register_forward_hook(lambda block, _args, _output: block._hf_hook.__exit__()),
        )

    def __deepcopy__(self, memo: dict) -> WeightsOnDisk:
        """For a copy of the block: what is on disk is shared."""
        copied = memo[id(self)] = copy.copy(self)
        copied.block, copied.hooks = copy.deepcopy(self.block, memo), copy.deepcopy(self.hooks, memo)
        copied.weights_map = ChainMap(dict(self.weights_map.maps[0]), *self.weights_map.maps[1:])
        return copied

    def __enter__(self) -> WeightsOnDisk:
        self.num_users += 1
        if self.num_users == 1:
            for name in self.names:
                # A copy: a tensor of the file itself would keep the whole file mapped.
                value = self.weights_map[name].to(self.device, copy=True)
                set_module_tensor_to_device(self.block, name, self.device, value=value, clear_cache=False)
        return self

    def __exit__(self, *_error: object) -> None:
        self.num_users -= 1
        if self.num_users == 0:
            for name in self.names:
                set_module_tensor_to_device(self.block, name, "meta", clear_cache=False)


def place_blocks(make_model: Callable[[], PreTrainedModel], device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that leave the blocks on disk and put all else on the device.

    Weights that transformers has to convert, as those of some mixtures of experts, go to files in a temporary folder.
    """
    with torch.device("meta"):
        skeleton = make_model()
    blocks = find_blocks(skeleton)
    path = next(path for path, module in skeleton.named_modules() if module is blocks)
    tensors = [*skeleton.named_parameters(remove_duplicate=False), *skeleton.named_buffers(remove_duplicate=False)]
    modules = {name.rpartition(".")[0] for name, _ in tensors if not name.startswith(f"{path}.")}
    places = {name: str(device) for name in modules} | {path: "disk"}
    # Accelerate says that weights stay on disk: they are meant to.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    folder = tempfile.mkdtemp(prefix="shoal-blocks-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"device_map": places, "offload_folder": folder}


def keep_blocks_on_disk(model: PreTrainedModel, device: torch.device) -> None:
    """Takes the blocks over from accelerate, which would read every weight anew at every call."""
    blocks = find_blocks(model)
    path = next(path for path, module in model.named_modules() if module is blocks)
    maps = (getattr(getattr(module, "_hf_hook", None), "weights_map", None) for module in blocks.modules())
    weights = OffloadedWeightsLoader(index=next(w.dataset.index for w in maps if isinstance(w, PrefixedDataset)))
    remove_hook_from_submodules(model)
    for index, block in enumerate(blocks):
        WeightsOnDisk(block, PrefixedDataset(weights, f"{path}.{index}."), device)


def weights_on_disk(block: nn.Module) -> WeightsOnDisk | None:
    """Where the block's weights are, None if they are in memory."""
    found = getattr(block, "_hf_hook", None)
    return found if isinstance(found, WeightsOnDisk) else None


def is_on_disk(model: PreTrainedModel) -> bool:
    """Whether the model's blocks are on disk."""
    return weights_on_disk(find_blocks(model)[0]) is not None


def copy_model(model: PreTrainedModel) -> PreTrainedModel:
    """A student to change; where the blocks are on disk, it shares the parameters in memory with its teacher."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()} if is_on_disk(model) else {})


def in_memory(block: nn.Module) -> AbstractContextManager:
    """Inside, the block's weights are in memory."""
    return weights_on_disk(block) or nullcontext()


def take_off_disk(module: nn.Module) -> None:
    """The weights of a block come into memory for good; those of other modules are there already."""
    on_disk = weights_on_disk(module)
    if on_disk is not None:
        on_disk.__enter__()
        for hook in on_disk.hooks:
            hook.remove()
        del module._hf_hook


def put_weight(module: nn.Module, name: str, value: Tensor) -> None:
    """Gives a parameter of a block, or of a model, a new value: on disk, or in a new tensor of this module's alone."""
    on_disk, parameter = weights_on_disk(module), module.get_parameter(name)
    value = value.to(parameter.dtype)
    if on_disk is not None and name in on_disk.names:
        on_disk.weights_map[name] = keep_off_memory(value)
    else:
        owner, _, own_name = name.rpartition(".")
        own = nn.Parameter(value.to(parameter.device, copy=True), requires_grad=False)
        module.get_submodule(owner).register_parameter(own_name, own)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every parameter's name and a function that reads it, wherever it is, in the order of `named_parameters`."""
    places = {
        id(weights.block.get_parameter(name)): (weights, name)
        for module in model.modules()
        if (weights := weights_on_disk(module)) is not None
        for name in weights.names
    }
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta":
            yield name, parameter.detach
        else:
            weights, inner = places[id(parameter)]
            yield name, functools.partial(weights.weights_map.__getitem__, inner)


def zeros_off_memory(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros in a file without a name, which goes when the tensor goes: the system can write them out to disk.

    The file is in $TMPDIR (/tmp), which has to be a disk to help.
    """
    count = torch.Size(shape).numel()
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(count * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)


def keep_off_memory(tensor: Tensor) -> Tensor:
    """The tensor's values, on disk."""
    return zeros_off_memory(*tensor.shape, dtype=tensor.dtype).copy_(tensor)
