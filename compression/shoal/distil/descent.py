"""Gradient descent over token windows, whatever the loss: the steps that distillation and pretraining share.

Where a process group exists (`torch.distributed`), each rank takes its share of every step's windows and gradients
are summed: the world size changes the speed and not the result. The weights may be shared out too (`shoal.large.shard`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal.errors import Collapsed
from shoal.large.shard import gather, is_sharded, local, share_like, whole
from shoal.recipe import Steps

# Below it, gradients of float16 would vanish rather than overflow.
MIN_LOSS_SCALE = 2.0**-16


class Diverged(Collapsed):
    """The training loss, or its gradient, is not finite; the weights are those of the step before."""


class Descent:
    """AdamW with warm-up and decay of the learning rate, over all windows in a new order every epoch.

    Where products are computed in float16, whose least number is 6e-8, the loss is scaled for the way back: without that,
    the gradients of many tokens' mean are zeros near the optimum (Micikevicius et al. 2018, arXiv 1710.03740).
    """

    def __init__(
        self, trained: Sequence[nn.Parameter], settings: Steps, *,
        num_windows: int, seed: int, dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        self.trained, self.settings = list(trained), settings
        self.scaler = torch.amp.GradScaler(self.trained[0].device.type, enabled=dtype == torch.float16)
        self.is_sharded = is_sharded(self.trained[0])
        self.num_windows, self.seed = num_windows, seed
        self.step = 0
        self.optimizer = torch.optim.AdamW(
            _group(self.trained, settings.weight_decay), lr=settings.learning_rate, fused=self.trained[0].is_cuda
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._scale_learning_rate)

    @property
    def is_done(self) -> bool:
        return self.step >= self.settings.num_steps

    def take_step(self, find_losses: Callable[[Tensor], Tensor], *, num_losses: int = 1) -> tuple[Tensor, dict[str, float]]:
        """One optimiser step down the sum of `find_losses(rows)` [num_losses], each a mean over the windows `rows`.

        Returns the losses, means over the step's windows, and {step, num_tokens, learning_rate, gradient_norm}.
        Raises `Diverged` on a loss or gradient that is not finite.
        """
        total, norm = self._find_gradients(find_losses, num_losses)
        while not bool(norm.isfinite()):
            if not self.scaler.is_enabled() or self.scaler.get_scale() <= MIN_LOSS_SCALE:
                raise Diverged(self._describe("gradient", norm))
            # The same windows again: a step that overflows is not lost. All ranks see the same norm.
            self.scaler.update(self.scaler.get_scale() / 2)
            total, norm = self._find_gradients(find_losses, num_losses)
        learning_rate = float(self.schedule.get_last_lr()[0])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total, {
            "step": self.step,
            "num_tokens": self.step * self.settings.windows_per_step * self.settings.window,
            "learning_rate": learning_rate,
            "gradient_norm": float(norm),
        }

    def _find_gradients(self, find_losses: Callable[[Tensor], Tensor], num_losses: int) -> tuple[Tensor, Tensor]:
        """The step's losses, and the norm that its gradients had before they were clipped."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(num_losses, dtype=torch.float64, device=self.trained[0].device)
        scale = self.scaler.scale(torch.ones((), device=total.device))
        for rows, share in self._passes():
            losses = find_losses(rows) * share
            (losses.sum() * scale).backward()
            total += losses.detach()
        self._sum_over_ranks(total)
        if not bool(total.isfinite().all()):
            raise Diverged(self._describe("training loss", total.sum()))
        self.scaler.unscale_(self.optimizer)
        return total, whole(nn.utils.clip_grad_norm_(self.trained, self.settings.max_gradient_norm))

    def _describe(self, what: str, value: Tensor) -> str:
        settings, dtypes = self.settings, ", or bfloat16 or float32 instead of float16" if self.scaler.is_enabled() else ""
        return (
            f"the {what} became {float(value)} at step {self.step + 1} of {settings.num_steps} with learning_rate="
            f"{settings.learning_rate:g}; the last good weights are kept: use a lower learning rate{dtypes}"
        )

    def _passes(self) -> list[tuple[Tensor, float]]:
        """This rank's windows of the step, some at a time, and their share of the step's.

        Ranks that share weights need each other in every pass: one with fewer windows runs a window that counts nothing.
        """
        per_step, per_pass = self.settings.windows_per_step, self.settings.windows_per_pass
        rows = self.rows_of_step(self.step)
        passes = [(chunk, len(chunk) / per_step) for chunk in rows.split(per_pass) if len(rows)]
        if self.is_sharded:
            most = math.ceil(math.ceil(per_step / dist.get_world_size()) / per_pass)
            passes += [(torch.zeros(1, dtype=torch.long), 0.0)] * (most - len(passes))
        return passes

    def rows_of_step(self, step: int) -> Tensor:
        """This rank's windows of a step: every epoch is a new order of all windows, the same on each rank."""
        count, per_step = self.num_windows, self.settings.windows_per_step
        positions = torch.arange(step * per_step, (step + 1) * per_step)
        orders: dict[int, Tensor] = {}
        for epoch in (positions // count).unique().tolist():
            orders[epoch] = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + epoch))
        rows = torch.stack([orders[int(p) // count][int(p) % count] for p in positions])
        return rows[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rows

    def state_dict(self) -> dict:
        """Everything that a later run needs to go on from here; where weights are shared out, rank 0 alone has it.

        Every rank calls this.
        """
        optimizer = self.optimizer.state_dict()
        moments = {
            index: {name: gather(value) for name, value in kept.items()} for index, kept in optimizer["state"].items()
        }
        return {
            "step": self.step,
            "weights": self.gather_weights(),
            "optimizer": optimizer | {"state": moments},
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from `state_dict()` of a run with the same settings, whatever its number of ranks was."""
        self.step = state["step"]
        self.share_weights(state["weights"])
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = {
            index: {name: share_like(parameters[index], value) for name, value in kept.items()}
            for index, kept in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def gather_weights(self) -> list[Tensor]:
        """The trained weights as they are now, whole; where they are shared out, rank 0 alone has them."""
        return [gather(p) for p in self.trained]

    def share_weights(self, weights: Sequence[Tensor]) -> None:
        """Puts back what `gather_weights` gave."""
        self.set_weights([local(share_like(p, weight)) for p, weight in zip(self.trained, weights, strict=True)])

    def copy_weights(self) -> list[Tensor]:
        """The trained weights as they are now, or this rank's share of them, in the computer's memory."""
        return [local(p.detach()).to("cpu", copy=True) for p in self.trained]

    @torch.no_grad()
    def set_weights(self, weights: Sequence[Tensor]) -> None:
        """Puts back what `copy_weights` gave."""
        for parameter, weight in zip(self.trained, weights, strict=True):
            local(parameter).copy_(weight)

    def _sum_over_ranks(self, total: Tensor) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
            for parameter in () if self.is_sharded else self.trained:  # summed already
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def _scale_learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        warmup = max(1, round(self.settings.num_steps * self.settings.warmup_fraction))
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.settings.num_steps - warmup)))


def tell_ranks(values: Tensor) -> Tensor:
    """Rank 0's values, on all ranks, each of which calls this; the values themselves where there is one process."""
    if dist.is_initialized():
        dist.broadcast(values, 0)
    return values


def _group(trained: Sequence[nn.Parameter], weight_decay: float) -> list[dict]:
    """Matrices decay; norms and biases do not (as in GPT-3 and Llama)."""
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
