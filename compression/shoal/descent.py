"""Gradient descent over token windows, whatever the loss: the steps that distillation and pretraining share.

Where a process group exists (`torch.distributed`), each rank takes its share of every step's windows and gradients
are summed: the world size changes the speed and not the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal.evaluate import Collapsed
from shoal.recipe import Steps


class Diverged(Collapsed):
    """The training loss is not finite; the weights are those of the step before."""


class Descent:
    """AdamW with warm-up and decay of the learning rate, over all windows in a new order every epoch."""

    def __init__(self, trained: Sequence[nn.Parameter], settings: Steps, *, num_windows: int, seed: int):
        self.trained, self.settings = list(trained), settings
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
        Raises `Diverged` on a loss that is not finite.
        """
        settings, rows = self.settings, self.rows_of_step(self.step)
        total = torch.zeros(num_losses, dtype=torch.float64, device=self.trained[0].device)
        for chunk in rows.split(settings.windows_per_pass) if len(rows) else ():  # more ranks than windows
            losses = find_losses(chunk) * (len(chunk) / settings.windows_per_step)
            losses.sum().backward()
            total += losses.detach()
        self._sum_over_ranks(total)
        if not bool(total.isfinite().all()):
            raise Diverged(
                f"the training loss became {float(total.sum())} at step {self.step + 1} of {settings.num_steps} with "
                f"learning_rate={settings.learning_rate:g}; the last good weights are kept: use a lower learning rate"
            )
        norm = nn.utils.clip_grad_norm_(self.trained, settings.max_gradient_norm)
        learning_rate = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total, {
            "step": self.step,
            "num_tokens": self.step * settings.windows_per_step * settings.window,
            "learning_rate": learning_rate,
            "gradient_norm": float(norm),
        }

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
        """Everything that a later run needs to go on from here."""
        return {
            "step": self.step,
            "weights": self.copy_weights(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from `state_dict()` of a run with the same settings."""
        self.step = state["step"]
        self.set_weights(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def copy_weights(self) -> list[Tensor]:
        """The trained weights as they are now, in the computer's memory."""
        return [p.detach().to("cpu", copy=True) for p in self.trained]

    @torch.no_grad()
    def set_weights(self, weights: Sequence[Tensor]) -> None:
        """Puts back what `copy_weights` gave."""
        for parameter, weight in zip(self.trained, weights, strict=True):
            parameter.copy_(weight)

    def _sum_over_ranks(self, total: Tensor) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
            for parameter in self.trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def _scale_learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        warmup = max(1, round(self.settings.num_steps * self.settings.warmup_fraction))
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.settings.num_steps - warmup)))


def _group(trained: Sequence[nn.Parameter], weight_decay: float) -> list[dict]:
    """Matrices decay; norms and biases do not (as in GPT-3 and Llama)."""
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
