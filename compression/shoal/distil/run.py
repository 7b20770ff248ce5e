"""A shallower student learns from its dense teacher: an iterator of metrics that does not know who listens.

    run = DistillationRun(student, teacher, lesson, settings, replaced=blocks)
    for metrics in run: ...        # one dict per optimiser step
    student = run.finish()         # LoRA merged, best weights

A step asks the `teacher` and mixes the `losses`; `descent` takes it, in one process or several. Where the two models are,
in memory or spread over the ranks, is the business of `places`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.distil.descent import Descent, Diverged, tell_ranks
from shoal.distil.losses import mix_losses
from shoal.distil.places import place_student
from shoal.distil.teacher import Answer, Lesson, Teacher
from shoal.distil.trainable import autocast, checkpoint_gradients, select_trained
from shoal.measure.divergence import find_divergence, pick_log_probs
from shoal.measure.perplexity import score_windows
from shoal.models.structure import find_blocks, text_config, watch_boundaries
from shoal.recipe import Distillation

NUM_CHECKS = 8
# A check costs about as much as half a step.
MIN_STEPS_PER_CHECK = 4


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
        self.settings, self.lesson, self.dtype = settings, lesson, student.dtype
        self.teacher = Teacher(teacher, lesson, settings)
        all_changed = keep_zeros or bool(getattr(text_config(student), "factored_projections", None))
        self.first_changed = 0 if all_changed else min(replaced, default=0)
        self.pairs = pair_boundaries(len(find_blocks(student)) + len(replaced), replaced, self.first_changed)
        self.place = place_student(student)
        self.student = self.place.learner
        with torch.random.fork_rng([student.device] if student.device.type == "cuda" else []):
            torch.manual_seed(seed)  # LoRA begins at random
            select_trained(self.student, settings, keep_zeros=keep_zeros, opened=self.place.opened)
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
        return self.place.bring_back()

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
        streams: list[Tensor] = []
        watch = watch_boundaries(self.student, lambda _boundary, stream: streams.append(stream))
        with autocast(self.student.device, self.dtype), watch if weights.needs_hidden_states else nullcontext():
            logits = self.student(input_ids=ids, use_cache=False).logits
        answer = self.teacher.answer(ids)
        return mix_losses(
            weights,
            divergence=self._find_divergence(rows, logits, answer) if weights.logit_kl else None,
            student=[streams[own] for own, _ in self.pairs] if streams else [],
            teacher=[answer.streams[boundary] for _, boundary in self.pairs] if answer.streams else [],
        )

    def _find_divergence(self, rows: Tensor, logits: Tensor, answer: Answer) -> Tensor:
        temperature, top = self.settings.temperature, self.teacher.top_tokens(rows, answer, logits.device)
        # Squared, so that the gradient keeps its size at every temperature (Hinton et al. 2015).
        return find_divergence(pick_log_probs(logits, top.ids, temperature), top).mean() * temperature**2

    def _check(self) -> dict[str, float]:
        """Divergence and perplexity on the held-out windows; remembers the weights if they are the best so far."""
        assert self.lesson.held_out is not None
        targets = self.teacher.measure_held_out()
        with autocast(self.student.device, self.dtype):
            scores = score_windows(self.student, self.lesson.held_out, targets)
        # Ranks on different processors may see different last digits, and have to stop, or not, together.
        kl, nll = tell_ranks(torch.stack([scores.kl.mean(), scores.nll.mean()]).to(self.student.device)).tolist()
        if math.isfinite(kl) and kl < self.best_kl:
            self.best_kl, self.checks_since_best, self.best_weights = kl, 0, self.descent.copy_weights()
        else:
            self.checks_since_best += 1
        return {"held_out_kl": kl, "held_out_perplexity": math.exp(min(nll, 700))}

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


def pair_boundaries(depth: int, replaced: tuple[int, ...], first_changed: int) -> list[tuple[int, int]]:
    """Boundaries (of the student, of the teacher of that depth that it stands for), behind the first changed block."""
    kept = [block for block in range(depth) if block not in replaced]
    return [(own, boundary) for own, boundary in enumerate([*kept[1:], depth], 1) if boundary > first_changed]
