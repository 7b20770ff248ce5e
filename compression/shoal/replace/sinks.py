"""Tokens with massive activations kept apart in a fit: they take part in it, and λ is not judged on them."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.linearity.gram import Gram
from shoal.linearity.sinks import find_sinks, measure_norms


def find_all_sinks(*streams_btd: Tensor) -> Tensor:
    """Which tokens [N] are sinks in any of the streams."""
    return torch.stack([find_sinks(measure_norms(stream)[1]) for stream in streams_btd]).any(0)


def add_apart(ordinary: Gram, sinks: Gram, x_nd: Tensor, y_ne: Tensor, sink_n: Tensor) -> None:
    """Adds the rows of sinks to one sum, and all others to the other."""
    sinks.add(0, x_nd[sink_n], y_ne[sink_n])
    ordinary.add(0, x_nd.masked_fill(sink_n[:, None], 0), y_ne, ~sink_n)
