"""A shallower student learns from its dense teacher: an iterator of metrics that does not know who listens.

    run = DistillationRun(student, teacher, windows, settings, replaced=blocks)
    for metrics in run: ...        # one dict per optimiser step
    student = run.finish()         # LoRA merged, best weights

Its steps are `descent`'s: several ranks learn what one does. Models whose blocks are on disk are spread over the ranks
(`shoal.large.shard`), none of which has to hold a whole one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.distil.descent import Descent, Diverged, tell_ranks
from shoal.distil.losses import mix_losses
from shoal.distil.trainable import autocast, checkpoint_gradients, merge_trained, select_trained
from shoal.large.on_disk import copy_model, is_on_disk
from shoal.large.shard import collect, spread
from shoal.measure.divergence import TopTokens, find_divergence, find_normalizer, pick_log_probs
from shoal.measure.perplexity import score_windows
from shoal.measure.targets import TeacherTargets, measure_targets
from shoal.models.structure import find_blocks, text_config, watch_boundaries
from shoal.recipe import Distillation
from shoal.text.windows import TokenWindows

NUM_CHECKS = 8
# A check costs about as much as half a step.
MIN_STEPS_PER_CHECK = 4
NUM_TOP = 64


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
    finite, ValueError if there is nothing to train, or no process group for models that are on disk.
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
        self.settings, self.lesson, self.seed = settings, lesson, seed
        needs_teacher = self._needs_logits() or settings.loss.needs_hidden_states
        self.teacher = spread(copy_model(teacher)) if needs_teacher and teacher and is_on_disk(teacher) else teacher
        if teacher is None and needs_teacher:
            raise ValueError("these loss weights and this temperature need the dense model while training; give teacher")
        depth = len(find_blocks(student)) + len(replaced)
        self.kept = [block for block in range(depth) if block not in replaced]
        all_changed = keep_zeros or bool(getattr(text_config(student), "factored_projections", None))
        self.first_changed = 0 if all_changed else min(replaced, default=0)
        self.dtype = student.dtype
        self.on_disk = student if is_on_disk(student) else None
        self.student = copy.deepcopy(student) if self.on_disk else student
        with torch.random.fork_rng([student.device] if student.device.type == "cuda" else []):
            torch.manual_seed(seed)  # LoRA begins at random
            select_trained(self.student, settings, keep_zeros=keep_zeros)
        self.student.eval()  # dropout would fall differently on every number of ranks
        if settings.gradient_checkpointing:
            checkpoint_gradients(self.student)
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        self.descent = Descent(self.trained, settings, num_windows=len(lesson.windows), seed=seed, dtype=self.dtype)
        self.best_kl, self.checks_since_best = math.inf, 0
        self.best_weights = self.descent.copy_weights()

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return self.descent.step

    def __iter__(self) -> Iterator[dict[str, float]]:
        check_every = max(MIN_STEPS_PER_CHECK, self.settings.num_steps // NUM_CHECKS)
        if self.step == 0 and self.lesson.held_out is not None:
            yield {"step": 0, "num_tokens": 0, **self._check()}
        while not self.descent.is_done:
            metrics = self._take_step()
            if self.lesson.held_out is not None and (self.step % check_every == 0 or self.descent.is_done):
                metrics |= self._check()
            yield metrics
            if self.settings.patience and self.checks_since_best >= self.settings.patience:
                return

    def finish(self) -> PreTrainedModel:
        """The student with its best checked weights, LoRA merged, in evaluation mode and its first dtype.

        A student that came with its blocks on disk has them there again: on rank 0, the others' is as it came.
        """
        if self.lesson.held_out is not None:
            self.descent.set_weights(self.best_weights)
        if self.on_disk:
            collect(self.student, self.on_disk, merge_trained)
            return self.on_disk
        merge_trained(self.student)
        self.student.gradient_checkpointing_disable()
        for parameter in self.student.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(self.dtype)
        return self.student.eval()

    def state_dict(self) -> dict:
        """Everything that a later run needs to go on from here; of a spread student on rank 0. Every rank calls this."""
        state, now = self.descent.state_dict(), self.descent.copy_weights()
        self.descent.set_weights(self.best_weights)
        best_weights = self.descent.gather_weights()
        self.descent.set_weights(now)
        best = {"best_weights": best_weights, "best_kl": self.best_kl, "checks_since_best": self.checks_since_best}
        return state | best

    def load_state_dict(self, state: dict) -> None:
        """Goes on from `state_dict()` of a run with the same settings, whatever its number of ranks was."""
        self.best_kl, self.checks_since_best = state["best_kl"], state["checks_since_best"]
        self.descent.share_weights(state["best_weights"])
        self.best_weights = self.descent.copy_weights()
        self.descent.load_state_dict(state)

    def _take_step(self) -> dict[str, float]:
        try:
            losses, metrics = self.descent.take_step(self._find_losses)
        except Diverged:
            self.descent.set_weights(self.best_weights)
            raise
        return {"step": metrics["step"], "num_tokens": metrics["num_tokens"], "loss": float(losses.sum()), **metrics}

    def _find_losses(self, rows: Tensor) -> Tensor:
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
        needs_logits = self._needs_logits()
        if self.teacher is None or not (needs_logits or self.settings.loss.needs_hidden_states):
            return [], None
        streams: list[Tensor] = []
        with watch_boundaries(self.teacher, lambda _boundary, stream: streams.append(stream)):
            if needs_logits:
                return streams, self.teacher(input_ids=ids, use_cache=False).logits
            self.teacher(input_ids=ids, use_cache=False, logits_to_keep=1)  # the whole model: it gathers what is shared out
        return streams, None

    def _needs_logits(self) -> bool:
        """Whether the teacher has to run for its logits: the loss has them, and nobody measured them before."""
        targets = self.lesson.targets
        measured = targets is not None and self.settings.temperature in targets.log_normalizers
        return bool(self.settings.loss.logit_kl) and not measured

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
        with autocast(self.student.device, self.dtype):
            scores = score_windows(self.student, held_out, self.lesson.held_out_targets)
        # Ranks on different processors may see different last digits, and have to stop, or not, together.
        kl, nll = tell_ranks(torch.stack([scores.kl.mean(), scores.nll.mean()]).to(self.student.device)).tolist()
        if math.isfinite(kl) and kl < self.best_kl:
            self.best_kl, self.checks_since_best, self.best_weights = kl, 0, self.descent.copy_weights()
        else:
            self.checks_since_best += 1
        return {"held_out_kl": kl, "held_out_perplexity": math.exp(min(nll, 700))}
