"""Blocks out of a model, so that what is left is a stock model of fewer blocks: it has to load as it was measured.

Transformers builds a block from the configuration and the block's place: its kind of attention, whether it is a mixture
of experts, a scale that falls with depth. So the shorter model is built once without weights, as a loader will build it,
and every block that stays is held against the one in its new place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from shoal.models.layer_settings import keep_layers
from shoal.models.structure import check_block_indices, find_blocks, text_config

# What hooks, device placement and training leave behind is not how a module was built.
PLAIN = (bool, int, float, str, type(None), list, tuple, dict)
# Gemma 4's last block of each kind keeps its keys and values for an assistant model: nothing of its own output.
FOR_OTHERS = {"store_full_length_kv"}


@dataclass(frozen=True)
class Shortening:
    """A model of the blocks `kept` of another, built without weights. `recomputed` holds those of `kept` that compute
    something else in their new place, since they scale by it."""

    kept: tuple[int, ...]
    skeleton: PreTrainedModel
    recomputed: frozenset[int]


def plan_shortening(model: PreTrainedModel, dropped: Iterable[int]) -> Shortening:
    """The shorter model that is left without the blocks `dropped`.

    Raises ValueError for an index that the model does not have, if no block would be left, or if no configuration of
    this family describes the blocks that stay.
    """
    blocks, gone = find_blocks(model), set(dropped)
    check_block_indices(gone, len(blocks))
    kept = tuple(index for index in range(len(blocks)) if index not in gone)
    try:
        config = _shorten_config(model, kept)
        skeleton = build_skeleton(type(model), config)
        rebuilt = find_blocks(skeleton)
    except Exception as error:  # whatever a family's configuration does not bear
        raise ValueError(f"{_name(model)} cannot be without blocks {sorted(gone)}: {error}") from error
    _require_attention(model, kept)
    recomputed = set()
    for position, index in enumerate(kept):
        changes = list(_compare(blocks[index], rebuilt[position], _Move(index, kept, len(blocks))))
        for change in changes:
            if not change.is_recomputed:
                raise ValueError(
                    f"{_name(model)} cannot be without blocks {sorted(gone)}: its block {index} would be block {position}, "
                    f"and a stock block {position} has {change}: replace other blocks"
                )
        if changes:
            recomputed.add(index)
    return Shortening(kept, skeleton, frozenset(recomputed))


def require_shortenable(model: PreTrainedModel, blocks: Iterable[int] | None) -> None:
    """Raises ValueError if no configuration describes the model without `blocks`, or without a middle one if not given."""
    plan_shortening(model, blocks if blocks is not None else [len(find_blocks(model)) // 2])


def drop_blocks(model: PreTrainedModel, dropped: Iterable[int]) -> None:
    """Removes blocks in place; configuration, cache indices and what depends on a block's place follow.

    Raises ValueError as `plan_shortening`.
    """
    plan = plan_shortening(model, dropped)
    blocks = find_blocks(model)
    survivors = [blocks[index] for index in plan.kept]
    del blocks[:]
    blocks.extend(survivors)
    _adopt_settings(model, plan.skeleton)


def recompute_blocks(model: PreTrainedModel, dropped: Iterable[int]) -> dict[int, nn.Module]:
    """The blocks that compute something else once `dropped` are gone, as they will be, by their present index.

    They share their weights with the model's. Raises ValueError as `plan_shortening`.
    """
    plan = plan_shortening(model, dropped)
    blocks, rebuilt = find_blocks(model), find_blocks(plan.skeleton)
    changed = {}
    for position, index in enumerate(plan.kept):
        if index in plan.recomputed:
            changed[index] = copy.deepcopy(blocks[index], {id(p): p for p in blocks[index].parameters()})
            _adopt_settings(changed[index], rebuilt[position])
    return changed


def build_skeleton(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The model as a loader builds it before it reads weights: parameters on the meta device, buffers computed."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        skeleton = model_class(config)
    for parameter in skeleton.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # what a loader marks the weights with that it has
    skeleton.initialize_weights()
    return skeleton.eval()


def _shorten_config(model: PreTrainedModel, kept: tuple[int, ...]) -> PretrainedConfig:
    """The model's configuration for the blocks that are kept, made as a loader makes it."""
    whole, part = model.config, text_config(model)
    settings = whole.to_dict()
    inner = settings if part is whole else settings[next(name for name, value in vars(whole).items() if value is part)]
    shorter = keep_layers(inner, kept, part.num_hidden_layers)
    shorter[part.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    inner.update(shorter)
    return type(whole).from_dict(settings, attn_implementation=whole._attn_implementation)


def _require_attention(model: PreTrainedModel, kept: tuple[int, ...]) -> None:
    """Raises ValueError if none but recurrent blocks stay of a hybrid: its KV cache could not say how long it is."""
    kinds = getattr(text_config(model), "layer_types", None) or []
    is_attention = ["attention" in kind and not kind.startswith("linear") for kind in kinds]
    if any(is_attention) and not any(is_attention[index] for index in kept):
        stay = [index for index, is_it in enumerate(is_attention) if is_it]
        raise ValueError(f"{_name(model)} needs one of its attention blocks {stay}; replace other blocks")


def _name(model: PreTrainedModel) -> str:
    return f"this {type(model).__name__} ({model.config.model_type})"


@dataclass(frozen=True)
class _Change:
    """A setting of a block that would differ in its new place."""

    name: str
    old: Any
    new: Any
    is_recomputed: bool = False

    def __str__(self) -> str:
        return f"{self.name} = {self.new} and not {self.old}"


@dataclass(frozen=True)
class _Move:
    """Of block `index` of `depth` to its place among those that are kept."""

    index: int
    kept: tuple[int, ...]
    depth: int

    def explains(self, name: str, old: Any, new: Any) -> bool:
        """Whether a setting only says the block's place, the number of blocks, or something of all blocks."""
        numbers = (self.index, self.kept.index(self.index)), (self.depth, len(self.kept))
        if name in FOR_OTHERS or (type(old) is type(new) is int and (old, new) in numbers):
            return True
        return new == keep_layers({name: old}, self.kept, self.depth)[name]


def _compare(block: nn.Module, rebuilt: nn.Module, move: _Move) -> Iterator[_Change]:
    """What would change for a block that is built anew in another place."""
    ours, theirs = (dict(module.named_modules()) for module in (block, rebuilt))
    for name in ours.keys() ^ theirs.keys():
        old, new = (type(found[name]).__name__ if name in found else None for found in (ours, theirs))
        yield _Change(name, old, new)
    for name in sorted(ours.keys() & theirs.keys()):
        yield from _compare_modules(name, ours[name], theirs[name], move)


def _compare_modules(name: str, ours: nn.Module, theirs: nn.Module, move: _Move) -> Iterator[_Change]:
    prefix = f"{name}." if name else ""
    if type(ours) is not type(theirs):
        yield _Change(name or "itself", type(ours).__name__, type(theirs).__name__)
    shapes = [{key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)} for module in (ours, theirs)]
    for key in shapes[0].keys() | shapes[1].keys():
        if shapes[0].get(key) != shapes[1].get(key):
            yield _Change(prefix + key, shapes[0].get(key), shapes[1].get(key))
    for key, new in _settings(theirs).items():
        old = vars(ours).get(key)
        if isinstance(old, Tensor):  # a state that a pass has left behind
            continue
        if old != new and not move.explains(key, old, new):
            yield _Change(prefix + key, old, new, is_recomputed=isinstance(old, float) and isinstance(new, float))
    for key, new in _lost_buffers(theirs).items():
        old = getattr(ours, key)
        if old.device.type == "meta":
            continue
        if old.shape != new.shape or not torch.equal(old.to("cpu", new.dtype), new):
            yield _Change(prefix + key, tuple(old.shape), tuple(new.shape), is_recomputed=old.shape == new.shape)


def _settings(module: nn.Module) -> dict[str, Any]:
    """How the module was built, as far as plain values say it."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, PLAIN) and not name.startswith("_") and name != "training"
    }


def _lost_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The module's buffers that no checkpoint holds: a loader computes them anew."""
    buffers = {name: value for name, value in module.named_buffers(recurse=False) if value.device.type != "meta"}
    return {name: value for name, value in buffers.items() if name in module._non_persistent_buffers_set}


def _adopt_settings(module: nn.Module, skeleton: nn.Module) -> None:
    """Makes the module in place what the skeleton is; its weights stay."""
    ours = dict(module.named_modules())
    for name, built in skeleton.named_modules():
        if name not in ours:  # outside the blocks: a pooler that the files lack
            continue
        configs = {key: value for key, value in vars(built).items() if isinstance(value, PretrainedConfig)}
        for key, value in (_settings(built) | configs).items():
            setattr(ours[name], key, value)
        for key, value in _lost_buffers(built).items():
            ours[name].register_buffer(key, value.to(getattr(ours[name], key)), persistent=False)
