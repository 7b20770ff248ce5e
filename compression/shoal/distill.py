"""A shallower student learns from its dense teacher: an iterator of metrics that does not know who listens.

    run = DistillationRun(student, teacher, windows, settings, replaced=blocks)
    for metrics in run: ...        # one dict per optimiser step
    student = run.finish()         # LoRA merged, best weights

Where a process group exists (`torch.distributed`), each rank takes its share of every step's windows and gradients
are summed: the world size changes the speed and not the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.blocks import find_blocks, text_config, watch_boundaries
from shoal.evaluate import Collapsed, score_windows
from shoal.losses import TopTokens, find_divergence, find_normalizer, mix_losses, pick_log_probs
from shoal.recipe import Distillation
from shoal.teacher import TeacherTargets, measure_targets
from shoal.text import TokenWindows
from shoal.trainable import autocast, merge_trained, select_trained

NUM_CHECKS = 8
# A check costs about as much as half a step.
MIN_STEPS_PER_CHECK = 4
NUM_TOP = 64


class Diverged(Collapsed):
    """The distillation loss is not finite; the student holds the last weights that were checked and good."""


@dataclass(frozen=True)
class Lesson:
    """What is learned from: windows, the teacher's targets on them if measured before, and held-out windows to check."""

    windows: TokenWindows
    targets: TeacherTargets | None = None
    held_out: TokenWindows | None = None
    held_out_targets: TeacherTargets | None = None


class DistillationRun:
    """Iterating trains; each step yields {step, num_tokens, loss, learning_rate, gradient_norm, …}.

    Eight times at most, and after the last step, it also yields `held_out_kl` and `held_out_perplexity`; the
    weights with the lowest `held_out_kl` are the ones that `finish` leaves. With `keep_zeros`, what is zero in the
    projections of the blocks stays zero, in training as in what `finish` leaves. Raises `Diverged` on a loss that is not
    finite, ValueError if there is nothing to train.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        lesson: Lesson,
        settings: Distillation,
        *,
        replaced: tuple[int, ...],
        keep_zeros: bool = False,
        seed: int = 0,
    ):
        self.settings, self.lesson, self.teacher, self.seed = settings, lesson, teacher, seed
        needs_live_logits = settings.loss.logit_kl and not self._has_targets()
        if teacher is None and (needs_live_logits or settings.loss.needs_hidden_states):
            raise ValueError("these loss weights and this temperature need the dense model while training; give teacher")
        depth = len(find_blocks(student)) + len(replaced)
        self.kept = [block for block in range(depth) if block not in replaced]
        all_changed = keep_zeros or bool(getattr(text_config(student), "factored_projections", None))
        self.first_changed = 0 if all_changed else min(replaced, default=0)
        self.dtype = student.dtype
        with torch.random.fork_rng([student.device] if student.device.type == "cuda" else []):
            torch.manual_seed(seed)  # LoRA begins at random
            self.student = select_trained(student, settings, keep_zeros=keep_zeros)
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        # A parameter of its own group for maps and biases would not help: no weight decay by default.
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=self.trained[0].is_cuda
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._scale_learning_rate)
        self.step = 0
        self.best_kl, self.checks_since_best = math.inf, 0
        self.best_weights = self._copy_weights()

    def __iter__(self) -> Iterator[dict[str, float]]:
        self.student.train()
        check_every = max(MIN_STEPS_PER_CHECK, self.settings.num_steps // NUM_CHECKS)
        if self.step == 0 and self.lesson.held_out is not None:
            yield {"step": 0, "num_tokens": 0, **self._check()}
        while self.step < self.settings.num_steps:
            metrics = self._take_step()
            if self.lesson.held_out is not None and (self.step % check_every == 0 or self.step == self.settings.num_steps):
                metrics |= self._check()
            yield metrics
            if self.settings.patience and self.checks_since_best >= self.settings.patience:
                return

    def finish(self) -> PreTrainedModel:
        """The student with its best checked weights, LoRA merged, in evaluation mode and its first dtype."""
        if self.lesson.held_out is not None:
            self._restore_weights()
        merged = merge_trained(self.student)
        for parameter in merged.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(self.dtype)
        return merged.eval()

    def state_dict(self) -> dict:
        """Everything that a later run needs to go on from here."""
        return {
            "step": self.step,
            "weights": self._copy_weights(),
            "best_weights": self.best_weights,
            "best_kl": self.best_kl,
            "checks_since_best": self.checks_since_best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from `state_dict()` of a run with the same settings."""
        self.step, self.best_kl, self.checks_since_best = state["step"], state["best_kl"], state["checks_since_best"]
        self.best_weights = state["best_weights"]
        self._set_weights(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def _take_step(self) -> dict[str, float]:
        settings = self.settings
        rows = self._rows_of_step()
        total = torch.zeros((), dtype=torch.float64, device=self.student.device)
        for chunk in rows.split(settings.windows_per_pass) if len(rows) else ():  # more ranks than windows
            loss = self._find_loss(chunk) * (len(chunk) / settings.windows_per_step)
            loss.backward()
            total += loss.detach()
        self._sum_over_ranks(total)
        if not math.isfinite(float(total)):
            self._restore_weights()
            raise Diverged(
                f"the distillation loss became {float(total)} at step {self.step + 1} of {settings.num_steps} with "
                f"learning_rate={settings.learning_rate:g}; the last good weights are kept: use a lower learning rate"
            )
        norm = nn.utils.clip_grad_norm_(self.trained, settings.max_gradient_norm)
        learning_rate = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {
            "step": self.step,
            "num_tokens": self.step * settings.windows_per_step * settings.window,
            "loss": float(total),
            "learning_rate": learning_rate,
            "gradient_norm": float(norm),
        }

    def _rows_of_step(self) -> Tensor:
        """This rank's windows of the step: every epoch is a new order of all windows, the same on each rank."""
        count, per_step = len(self.lesson.windows), self.settings.windows_per_step
        positions = torch.arange(self.step * per_step, (self.step + 1) * per_step)
        orders: dict[int, Tensor] = {}
        for epoch in (positions // count).unique().tolist():
            orders[epoch] = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + epoch))
        rows = torch.stack([orders[int(p) // count][int(p) % count] for p in positions])
        return rows[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else rows

    def _find_loss(self, rows: Tensor) -> Tensor:
        ids = self.lesson.windows.ids[rows].to(self.student.device)
        weights = self.settings.loss
        entering: list[Tensor] = []
        watch = watch_boundaries(self.student, lambda _boundary, stream: entering.append(stream))
        with autocast(self.student.device, self.dtype), watch if weights.needs_hidden_states else nullcontext():
            logits = self.student(input_ids=ids, use_cache=False).logits
        streams, teacher_logits = self._ask_teacher(ids)
        divergence = None
        if weights.logit_kl:
            divergence = self._find_divergence(rows, logits, teacher_logits)
        positions = [p for p in range(1, len(self.kept) + 1) if self._boundary(p) > self.first_changed]
        return mix_losses(
            weights,
            divergence=divergence,
            student=[entering[p] for p in positions] if entering else [],
            teacher=[streams[self._boundary(p)] for p in positions] if streams else [],
        )

    def _find_divergence(self, rows: Tensor, logits: Tensor, teacher_logits: Tensor | None) -> Tensor:
        temperature = self.settings.temperature
        if teacher_logits is None:
            assert self.lesson.targets is not None
            top = self.lesson.targets.top_tokens(rows, logits.device, temperature)
        else:
            values, ids = teacher_logits.topk(min(NUM_TOP, teacher_logits.shape[-1]))
            normalizer, _ = find_normalizer(teacher_logits, temperature)
            top = TopTokens(ids, values.float() / temperature - normalizer[..., None])
        # Squared, so that the gradient keeps its size at every temperature (Hinton et al. 2015).
        return find_divergence(pick_log_probs(logits, top.ids, temperature), top).mean() * temperature**2

    @torch.no_grad()
    def _ask_teacher(self, ids: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The teacher's boundaries and logits for a batch, as far as the losses need them."""
        needs_logits = bool(self.settings.loss.logit_kl) and not self._has_targets()
        if self.teacher is None or not (needs_logits or self.settings.loss.needs_hidden_states):
            return [], None
        streams: list[Tensor] = []
        with watch_boundaries(self.teacher, lambda _boundary, stream: streams.append(stream)):
            if needs_logits:
                return streams, self.teacher(input_ids=ids, use_cache=False).logits
            self.teacher.base_model(input_ids=ids, use_cache=False)
        return streams, None

    def _has_targets(self) -> bool:
        targets = self.lesson.targets
        return targets is not None and self.settings.temperature in targets.log_normalizers

    def _boundary(self, position: int) -> int:
        """The teacher's boundary that the student's stream after `position` kept blocks stands for."""
        return self.kept[position] if position < len(self.kept) else self.kept[-1] + 1 + self._num_replaced_at_end()

    def _num_replaced_at_end(self) -> int:
        depth = len(find_blocks(self.teacher)) if self.teacher is not None else self.kept[-1] + 1
        return depth - self.kept[-1] - 1

    def _check(self) -> dict[str, float]:
        """Divergence and perplexity on the held-out windows; remembers the weights if they are the best so far."""
        held_out = self.lesson.held_out
        assert held_out is not None
        if self.lesson.held_out_targets is None:
            assert self.teacher is not None, "held-out windows without targets need the teacher"
            self.lesson = Lesson(
                self.lesson.windows, self.lesson.targets, held_out, measure_targets(self.teacher, held_out, num_top=NUM_TOP)
            )
        assert self.lesson.held_out_targets is not None
        self.student.eval()
        with autocast(self.student.device, self.dtype):
            scores = score_windows(self.student, held_out, self.lesson.held_out_targets)
        self.student.train()
        kl = float(scores.kl.mean())
        if math.isfinite(kl) and kl < self.best_kl:
            self.best_kl, self.checks_since_best, self.best_weights = kl, 0, self._copy_weights()
        else:
            self.checks_since_best += 1
        return {"held_out_kl": kl, "held_out_perplexity": math.exp(min(float(scores.nll.mean()), 700))}

    def _copy_weights(self) -> list[Tensor]:
        return [p.detach().to("cpu", copy=True) for p in self.trained]

    def _restore_weights(self) -> None:
        self._set_weights(self.best_weights)

    @torch.no_grad()
    def _set_weights(self, weights: list[Tensor]) -> None:
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
