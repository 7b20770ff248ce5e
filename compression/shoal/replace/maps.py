"""Fitted replacements in, a shallower model out."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal.files import write_aside
from shoal.large.on_disk import weights_on_disk
from shoal.models.modeling_shoal import LinearBlock, attach
from shoal.models.projections import find_down_proj
from shoal.models.shorten import drop_blocks
from shoal.models.structure import check_block_indices, find_blocks, holds_own_modules, text_config


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
    """What stands in for the replaced blocks.

    `maps` holds one affine map for each run of neighbouring replaced blocks, by the run's first block; runs without
    one are dropped or folded. `down_proj` holds new weights [out, in] of kept blocks, by their index, and `down_bias` the
    new biases [out] of those that have one.
    """

    blocks: tuple[int, ...]
    maps: dict[int, AffineMap] = field(default_factory=dict)
    down_proj: dict[int, Tensor] = field(default_factory=dict)
    down_bias: dict[int, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes a safetensors file, aside and renamed."""
        tensors = {f"down_proj.{block}": weight for block, weight in self.down_proj.items()}
        tensors |= {f"down_bias.{block}": bias for block, bias in self.down_bias.items()}
        for block, affine in self.maps.items():
            parts = affine.update if isinstance(affine.update, tuple) else (affine.update,)
            tensors |= {f"map.{block}.update.{i}": part for i, part in enumerate(parts)}
            tensors[f"map.{block}.bias"] = affine.bias
        blocks = ",".join(map(str, self.blocks))
        with write_aside(path) as aside:
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, aside, {"blocks": blocks})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ValueError if the file is not whole."""
        try:
            with safe_open(path, "pt") as file:
                blocks = tuple(int(block) for block in file.metadata()["blocks"].split(",") if block)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"fitted replacement {str(path)!r} is damaged ({error}); delete the file to fit again"
            ) from error
        replacement = cls(blocks)
        for name, tensor in tensors.items():
            what, block, *part = name.split(".")
            if what == "down_proj":
                replacement.down_proj[int(block)] = tensor
            elif what == "down_bias":
                replacement.down_bias[int(block)] = tensor
            elif part == ["bias"]:
                second = tensors.get(f"map.{block}.update.1")
                first = tensors[f"map.{block}.update.0"]
                replacement.maps[int(block)] = AffineMap(first if second is None else (first, second), tensor)
        return replacement


def find_runs(blocks: Iterable[int]) -> list[range]:
    """Neighbouring blocks together, in order: (5, 12, 13) → [5..5], [12..13]."""
    runs: list[range] = []
    for block in sorted(set(blocks)):
        if runs and runs[-1].stop == block:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs


def apply_replacement(model: PreTrainedModel, replacement: Replacement) -> None:
    """Changes the model in place: new `down_proj` weights, blocks out, maps in.

    Raises ValueError if blocks do not exist, none would be left, or the model holds maps or factors already.
    """
    blocks, width = find_blocks(model), text_config(model).hidden_size
    check_block_indices(replacement.blocks, len(blocks))
    if holds_own_modules(model):
        raise ValueError(
            "this model holds linear blocks or factored projections already; start from its dense model and make all "
            "changes at once"
        )
    for index, weight in replacement.down_proj.items():
        projection = find_down_proj(blocks[index], width)
        assert projection is not None
        _set(blocks[index], projection, "weight", _as_stored(projection, weight))
        if index in replacement.down_bias:
            _set(blocks[index], projection, "bias", replacement.down_bias[index])
    kept = [index for index in range(len(blocks)) if index not in replacement.blocks]
    drop_blocks(model, replacement.blocks)
    entries = []
    for run in find_runs(replacement.blocks):
        if run.start in replacement.maps:
            position = sum(index < run.start for index in kept) - 1
            where = "after" if position >= 0 else "before"
            affine = replacement.maps[run.start]
            attach(find_blocks(model)[max(position, 0)], affine.to_block(model.dtype).to(model.device), where)
            entries.append({"block": max(position, 0), "where": where, "replaces": list(run), "rank": affine.rank})
    if entries:
        text_config(model).linear_blocks = entries


def make_replaced(model: PreTrainedModel, replacement: Replacement) -> PreTrainedModel:
    """The changed model, which shares all parameters with `model`: to try maps out, not to train or keep.

    Raises ValueError as `apply_replacement`, or if weights would change, which the two have in common.
    """
    if replacement.down_proj:
        raise ValueError("new down_proj weights would change the model that they are shared with; apply them to a copy")
    # A memo of the parameters makes the copy share them: only modules and configuration are its own.
    changed = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    apply_replacement(changed, replacement)
    return changed


def _set(block: nn.Module, projection: nn.Linear | Conv1D, what: str, value: Tensor) -> None:
    on_disk = weights_on_disk(block)
    if on_disk is None:
        parameter = projection.get_parameter(what)
        parameter.data = value.to(parameter)
        return
    name = next(name for name, module in block.named_modules() if module is projection)
    on_disk.weights_map[f"{name}.{what}"] = value


def weight_of(projection) -> Tensor:
    """The weight as [out, in], however the module stores it."""
    return projection.weight.T if isinstance(projection, Conv1D) else projection.weight


def _as_stored(projection, weight: Tensor) -> Tensor:
    return weight.T.contiguous() if isinstance(projection, Conv1D) else weight


def linear_blocks(model: PreTrainedModel) -> list[LinearBlock]:
    """The maps in the model, from input to output."""
    return [module for module in model.modules() if isinstance(module, LinearBlock)]
