"""Fitted replacements in, a shallower model out."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.files import write_aside
from shoal.large.on_disk import weights_on_disk
from shoal.models.modeling_shoal import LinearBlock, attach, remove
from shoal.models.shorten import drop_blocks
from shoal.models.structure import check_block_indices, find_blocks, holds_own_modules, text_config
from shoal.replace.unit_stack import NUM_SAMPLED, explain_parts, find_parts
from shoal.units import Unit, find_runs, list_places, name_units, read_unit, whole_blocks


@dataclass(frozen=True)
class AffineMap:
    """y = x + update x + bias on the residual stream. `update` [d, d], or factors [d, r] and [r, d] of it; `bias` [d]."""

    update: Tensor | tuple[Tensor, Tensor]
    bias: Tensor

    @property
    def rank(self) -> int | None:
        return self.update[0].shape[1] if isinstance(self.update, tuple) else None

    @property
    def matrix(self) -> Tensor:
        """The update [d, d]."""
        return self.update[0] @ self.update[1] if isinstance(self.update, tuple) else self.update

    def __call__(self, x_nd: Tensor) -> Tensor:
        """The mapped rows, computed in float32 and returned in the dtype of x."""
        x = x_nd.float()
        if isinstance(self.update, tuple):
            step = (x @ self.update[1].T.float()) @ self.update[0].T.float()
        else:
            step = x @ self.update.T.float()
        return (x + step + self.bias.float()).to(x_nd.dtype)

    def to_block(self, dtype: torch.dtype) -> LinearBlock:
        """The map as a module."""
        linear = LinearBlock(len(self.bias), self.rank)
        if isinstance(self.update, tuple):
            weights = {"update.0.weight": self.update[1], "update.1.weight": self.update[0], "update.1.bias": self.bias}
        else:
            weights = {"update.weight": self.update, "update.bias": self.bias}
        linear.load_state_dict(weights)
        return linear.to(dtype)


@dataclass
class Replacement:
    """What stands in for the units that go: blocks, and the attention or MLP of blocks that stay.

    `maps` holds one affine map for each run of neighbouring units, by the boundary inside the run, or at its end, that it
    stands at (the first of them: of a run of blocks, its first block); runs without one are dropped or folded. `weights`
    holds new weights of kept blocks, as these store them, by the block's index and their name in it.
    """

    units: tuple[Unit, ...]
    maps: dict[int, AffineMap] = field(default_factory=dict)
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that go as a whole."""
        return whole_blocks(self.units)

    def save(self, path: Path) -> None:
        """Writes a safetensors file, aside and renamed."""
        tensors = {f"weight.{block}.{name}": w for block, own in self.weights.items() for name, w in own.items()}
        for boundary, affine in self.maps.items():
            parts = affine.update if isinstance(affine.update, tuple) else (affine.update,)
            tensors |= {f"map.{boundary}.update.{i}": part for i, part in enumerate(parts)}
            tensors[f"map.{boundary}.bias"] = affine.bias
        units = ",".join(map(str, self.units))
        with write_aside(path) as aside:
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, aside, {"units": units})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ValueError if the file is not whole."""
        try:
            with safe_open(path, "pt") as file:
                units = tuple(read_unit(unit) for unit in file.metadata()["units"].split(",") if unit)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"fitted replacement {str(path)!r} is damaged ({error}); delete the file to fit again"
            ) from error
        replacement = cls(units)
        for name, tensor in tensors.items():
            what, index, part = name.split(".", 2)
            if what == "weight":
                replacement.weights.setdefault(int(index), {})[part] = tensor
            elif part == "bias":
                second = tensors.get(f"map.{index}.update.1")
                first = tensors[f"map.{index}.update.0"]
                replacement.maps[int(index)] = AffineMap(first if second is None else (first, second), tensor)
        return replacement


def apply_replacement(model: PreTrainedModel, replacement: Replacement) -> None:
    """Changes the model in place: new weights, blocks and parts of blocks out, maps in.

    Raises ValueError if units do not exist, no block would be left, or the model holds modules of Shoal's already.
    """
    blocks = find_blocks(model)
    if holds_own_modules(model):
        raise ValueError(
            "this model holds linear blocks, factored projections or gaps already; start from its dense model and make "
            "all changes at once"
        )
    check_block_indices([place // 2 for place in list_places(replacement.units)], len(blocks))
    for index, weights in replacement.weights.items():
        for name, weight in weights.items():
            _set(blocks[index], name, weight)
    absent = _name_parts(model, replacement)
    kept = [index for index in range(len(blocks)) if index not in replacement.blocks]
    drop_blocks(model, replacement.blocks)
    for name, num_outputs in absent.items():
        remove(model, name, num_outputs)
    if absent:
        text_config(model).absent_modules = absent
    entries = []
    for run in find_runs(list_places(replacement.units)):
        boundary = (run.start + 1) // 2
        if boundary in replacement.maps:
            position = sum(index < boundary for index in kept) - 1
            where = "after" if position >= 0 else "before"
            affine = replacement.maps[boundary]
            attach(find_blocks(model)[max(position, 0)], affine.to_block(model.dtype).to(model.device), where)
            replaced = list(name_units(run))
            entries.append({"block": max(position, 0), "where": where, "replaces": replaced, "rank": affine.rank})
    if entries:
        text_config(model).linear_blocks = entries


def _name_parts(model: PreTrainedModel, replacement: Replacement) -> dict[str, int | None]:
    """Attentions and MLPs that leave blocks that stay: their names in the shorter model, and how many values they return.

    Raises ValueError if a block's attention and MLP do not stand one after the other.
    """
    gone = [place for place in list_places(replacement.units) if place // 2 not in replacement.blocks]
    if not gone:
        return {}
    blocks = find_blocks(model)
    path = next(path for path, module in model.named_modules() if module is blocks)
    found = find_parts(model, torch.arange(NUM_SAMPLED, device=model.device)[None] % text_config(model).vocab_size)
    absent = {}
    for place in gone:
        block, parts = place // 2, found[place // 2]
        if parts is None:
            raise ValueError(explain_parts(block))
        position = block - sum(other < block for other in replacement.blocks)
        absent[f"{path}.{position}.{parts[place % 2].name}"] = parts[place % 2].num_outputs
    return absent


def make_replaced(model: PreTrainedModel, replacement: Replacement) -> PreTrainedModel:
    """The changed model, which shares all parameters with `model`: to try maps out, not to train or keep.

    Raises ValueError as `apply_replacement`, or if weights would change, which the two have in common.
    """
    if replacement.weights:
        raise ValueError("new weights would change the model that they are shared with; apply them to a copy")
    # A memo of the parameters makes the copy share them: only modules and configuration are its own.
    changed = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    apply_replacement(changed, replacement)
    return changed


def _set(block: nn.Module, name: str, value: Tensor) -> None:
    on_disk = weights_on_disk(block)
    if on_disk is None:
        parameter = block.get_parameter(name)
        parameter.data = value.to(parameter)
    else:
        on_disk.weights_map[name] = value


def linear_blocks(model: PreTrainedModel) -> list[LinearBlock]:
    """The maps in the model, from input to output."""
    return [module for module in model.modules() if isinstance(module, LinearBlock)]
