"""First and second moments of the residual stream around every block: sums over tokens, which can be added and kept.

Shapes: L blocks, d hidden size, N tokens. Memory is O(L · d²), whatever N.

Tokens are kept apart in two ways. Windows alternate between a *fit* and a *held-out* half. In each half, *sinks*
(the first position, and tokens whose norm is many times the window's median: massive activations, Sun et al.
2024) are apart from *ordinary* tokens: a few sinks carry most of the variance, so they would make every score
near 1, but maps must be fitted with them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoal.files import write_aside
from shoal.linearity.gram import Gram


@dataclass
class Moments:
    """Moments around every block l (x: stream before it, y: stream after it), and how they were made.

    `norm_ratio_sum` and `cosine_sum` [L] are sums over ordinary tokens of ‖y−x‖/‖y‖ and cos(x, y). `similarity`
    [L+1, L+1] sums the cosine between any two boundaries over `num_compared` ordinary tokens. `sink_norm_ratio`
    [L+1] is the largest norm over the median norm, averaged over windows when divided by `num_windows`.
    `source` names model weights and text.
    """

    ordinary: Gram
    sinks: Gram
    held_ordinary: Gram
    held_sinks: Gram
    norm_ratio_sum: Tensor
    cosine_sum: Tensor
    similarity: Tensor
    num_compared: Tensor
    sink_norm_ratio: Tensor
    num_windows: int
    source: str

    @classmethod
    def zeros(cls, num_blocks: int, hidden_size: int, source: str, device: torch.device | None = None) -> Self:
        def vector(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        grams = [Gram.zeros(num_blocks, hidden_size, hidden_size, device) for _ in range(4)]
        boundaries = num_blocks + 1
        return cls(
            ordinary=grams[0],
            sinks=grams[1],
            held_ordinary=grams[2],
            held_sinks=grams[3],
            norm_ratio_sum=vector(num_blocks),
            cosine_sum=vector(num_blocks),
            similarity=vector(boundaries, boundaries),
            num_compared=vector(1),
            sink_norm_ratio=vector(boundaries),
            num_windows=0,
            source=source,
        )

    @property
    def num_blocks(self) -> int:
        return len(self.norm_ratio_sum)

    @property
    def hidden_size(self) -> int:
        return self.ordinary.sum_x.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens seen, sinks and both halves included."""
        return int(sum(gram.num_tokens[0] for gram in self.grams.values()))

    @property
    def grams(self) -> dict[str, Gram]:
        names = ("ordinary", "sinks", "held_ordinary", "held_sinks")
        return {name: getattr(self, name) for name in names}

    def __add__(self, other: Moments) -> Moments:
        if self.source != other.source:
            raise ValueError(f"moments of {self.source!r} and {other.source!r} do not add: other model or other text")
        merged = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "source"}
        return Moments(**merged, source=self.source)

    def save(self, path: Path) -> None:
        """Writes a safetensors file, aside and renamed: a reader never sees half of it."""
        tensors = {f"{name}.{f.name}": getattr(gram, f.name) for name, gram in self.grams.items() for f in fields(gram)}
        tensors |= {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        metadata = {"source": self.source, "num_windows": str(self.num_windows)}
        with write_aside(path) as aside:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside, metadata)

    @classmethod
    def load(cls, path: Path, device: torch.device | None = None) -> Self:
        """Raises ValueError if the file is not whole."""
        try:
            with safe_open(path, "pt", device=str(device or "cpu")) as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            parts: dict[str, Any] = {
                name: Gram(*(tensors.pop(f"{name}.{f.name}") for f in fields(Gram)))
                for name in ("ordinary", "sinks", "held_ordinary", "held_sinks")
            }
            return cls(**parts, **tensors, num_windows=int(metadata["num_windows"]), source=metadata["source"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"moments file {str(path)!r} is damaged ({error}); delete it and measure again") from error
