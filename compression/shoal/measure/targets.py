"""What the dense model says about a text, measured once and kept: its top tokens and its token losses.

Enough for evaluation beside the dense model and for distillation of the logits without running it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from shoal.files import write_aside
from shoal.large.memory import MAX_LOGITS
from shoal.large.streamed import read_logits
from shoal.measure.divergence import TopTokens, find_normalizer
from shoal.models.structure import text_config
from shoal.recipe import NUM_TOP
from shoal.text.windows import TokenWindows


@dataclass(frozen=True)
class TeacherTargets:
    """Of windows [N, T]: top token ids and logits [N, T, K], log normalisers [N, T] by temperature, and nll [N, T−1].

    `nll` is the exact loss in nats of each token but a window's first. `text_sha256` names the windows.
    """

    ids: Tensor
    logits: Tensor
    log_normalizers: dict[float, Tensor]
    nll: Tensor
    text_sha256: str

    def top_tokens(self, rows: slice | Tensor, device: torch.device, temperature: float = 1.0) -> TopTokens:
        """The distribution at `temperature` for some windows. Raises KeyError if it was not measured at that one."""
        log_probs = self.logits[rows] / temperature - self.log_normalizers[temperature][rows][..., None]
        return TopTokens(self.ids[rows].long().to(device), log_probs.to(device))

    def require(self, windows: TokenWindows) -> None:
        """Raises ValueError if these targets are of other windows."""
        if windows.sha256 != self.text_sha256:
            raise ValueError(f"teacher targets are not of text {windows.name!r}: delete them and measure again")

    @classmethod
    def join(cls, parts: Sequence[TeacherTargets], windows: TokenWindows) -> Self:
        """The targets of windows that were measured in parts, in their order."""
        normalizers = {t: torch.cat([part.log_normalizers[t] for part in parts]) for t in parts[0].log_normalizers}
        ids, logits, nll = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "logits", "nll"))
        return cls(ids, logits, normalizers, nll, windows.sha256)

    def save(self, path: Path) -> None:
        """Writes a safetensors file, aside and renamed."""
        normalizers = {f"log_normalizer.{t}": tensor for t, tensor in self.log_normalizers.items()}
        tensors = {"ids": self.ids, "logits": self.logits, "nll": self.nll, **normalizers}
        with write_aside(path) as aside:
            save_file({k: v.contiguous() for k, v in tensors.items()}, aside, {"text_sha256": self.text_sha256})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ValueError if the file is not whole."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                text_sha256 = file.metadata()["text_sha256"]
            normalizers = {
                float(name.removeprefix("log_normalizer.")): tensor
                for name, tensor in tensors.items()
                if name.startswith("log_normalizer.")
            }
            return cls(tensors["ids"], tensors["logits"], normalizers, tensors["nll"], text_sha256)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"teacher targets {str(path)!r} are damaged ({error}); delete the file and measure again"
            ) from error


def choose_batch_size(model: PreTrainedModel, window: int) -> int:
    """Windows per forward pass so that the logits stay within `MAX_LOGITS` values."""
    return max(1, min(8, MAX_LOGITS // (window * text_config(model).vocab_size)))


@torch.no_grad()
def measure_targets(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    num_top: int = NUM_TOP,
    temperatures: tuple[float, ...] = (1.0,),
    on_progress: Callable[[int], None] = lambda _done: None,
) -> TeacherTargets:
    """The dense model's targets for `windows` in one pass; `on_progress` hears the windows done."""
    batch_size = choose_batch_size(model, windows.ids.shape[1])
    parts: list[tuple[Tensor, ...]] = []
    for _, ids, logits in read_logits(model, windows, batch_size, on_progress):
        top = logits.topk(min(num_top, logits.shape[-1]))
        normalizer = find_normalizer(logits)[0]
        others = [normalizer if t == 1.0 else find_normalizer(logits, t)[0] for t in temperatures]
        nll = token_losses(logits, normalizer, ids)
        parts.append(tuple(t.cpu() for t in (top.indices.int(), top.values.float(), nll, *others)))
    top_ids, top_logits, nll, *normalizers = (torch.cat(column) for column in zip(*parts, strict=True))
    return TeacherTargets(top_ids, top_logits, dict(zip(temperatures, normalizers, strict=True)), nll, windows.sha256)


def token_losses(logits_btv: Tensor, normalizer_bt: Tensor, ids_bt: Tensor) -> Tensor:
    """Negative log-likelihood in nats [batch, time − 1] of every token but a window's first."""
    chosen = logits_btv[:, :-1].gather(-1, ids_bt[:, 1:, None])[..., 0].float()
    return normalizer_bt[:, :-1] - chosen
