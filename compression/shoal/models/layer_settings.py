"""What a configuration says of single layers, rewritten for the layers that stay.

Families write it down in many ways: a list with an entry for each layer, a list of layer numbers, a count of the first
layers, numbers as keys, a pattern and how often it is repeated. Which of these a setting is can only be guessed from
its name and value; `shoal.models.shorten` holds the guess against the model that transformers makes of it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

# `first_k_dense_replace`, `max_window_layers`, `num_dense_layers`, `moe_layer_start_index`, …
COUNT = re.compile(r"^first_k_|layers$|layer_start|start_layer|layer_end|end_layer")
INDICES = re.compile(r"layer|block|_idxs?$|indices$|indexes$")
PER_LAYER = re.compile(r"layer|block|types$")
# Layers of their own, behind the stack: heads that predict further tokens, adapters.
OTHER_LAYERS = re.compile(r"^mtp|nextn|mtp_layers|adapter|hidden_layers|encoder_layers|decoder_layers")


def keep_layers(settings: dict[str, Any], kept: Sequence[int], depth: int) -> dict[str, Any]:
    """The settings of a stack of `depth` layers for a stack of those in `kept`; what is of no layer stays as it is."""
    return {name: _keep(name, value, kept, depth) for name, value in settings.items()}


def _keep(name: str, value: Any, kept: Sequence[int], depth: int) -> Any:
    if OTHER_LAYERS.search(name):
        return value
    if isinstance(value, (list, tuple)):
        return _keep_entries(name, list(value), kept, depth)
    if isinstance(value, str) and len(value) == depth and "pattern" in name:  # a letter for each layer
        return "".join(value[index] for index in kept)
    if isinstance(value, dict):
        return _keep_keys(name, value, kept, depth)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= depth and COUNT.search(name):
        if "end" in name:  # the last layer of a range
            return sum(index <= value for index in kept) - 1
        return sum(index < value for index in kept)
    return value


def _keep_entries(name: str, entries: list, kept: Sequence[int], depth: int) -> list:
    if _are_indices(entries, depth):
        return [position for position, index in enumerate(kept) if index in entries] if INDICES.search(name) else entries
    if len(entries) == depth and (PER_LAYER.search(name) or all(isinstance(e, (str, bool, type(None))) for e in entries)):
        return [entries[index] for index in kept]
    if 0 < len(entries) < depth and PER_LAYER.search(name) and all(isinstance(e, str) for e in entries):
        return [entries[index % len(entries)] for index in kept]  # a pattern that is repeated: RecurrentGemma's
    if all(isinstance(e, (list, tuple)) and len(e) == 2 and isinstance(e[0], (list, tuple)) for e in entries):
        # GPT-Neo's [[["global", "local"], 12]]: a pattern and how often it is repeated.
        expanded = list(itertools.chain.from_iterable(list(pattern) * times for pattern, times in entries))
        if len(expanded) == depth:
            return [[[expanded[index]], 1] for index in kept]
    return entries


def _are_indices(entries: list, depth: int) -> bool:
    """Whether these are numbers of layers: rising, and none outside the stack. A list of 0 and 1 is one of flags."""
    numbers = all(isinstance(e, int) and not isinstance(e, bool) and 0 <= e < depth for e in entries)
    return bool(entries) and numbers and all(a < b for a, b in itertools.pairwise(entries))


def _keep_keys(name: str, values: dict, kept: Sequence[int], depth: int) -> dict:
    numbers = [int(key) if str(key).isdigit() else -1 for key in values]
    if not numbers or not PER_LAYER.search(name) or not all(0 <= number < depth for number in numbers):
        return values
    positions = {index: position for position, index in enumerate(kept)}
    pairs = zip(numbers, values.items(), strict=True)
    return {type(key)(positions[number]): value for number, (key, value) in pairs if number in positions}
