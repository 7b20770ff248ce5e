"""What a student learns from: a lesson, and the dense model's answers for it, measured before or given while it trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.distil.places import place_teacher
from shoal.measure.divergence import TopTokens, find_normalizer
from shoal.measure.targets import TeacherTargets, measure_targets
from shoal.models.structure import watch_boundaries
from shoal.recipe import NUM_TOP, Distillation
from shoal.text.windows import TokenWindows


@dataclass(frozen=True)
class Lesson:
    """What is learned from: windows, the teacher's targets on them if measured before, and held-out windows to check."""

    windows: TokenWindows
    targets: TeacherTargets | None = None
    held_out: TokenWindows | None = None
    held_out_targets: TeacherTargets | None = None


@dataclass(frozen=True)
class Answer:
    """What the dense model says of a batch: the streams at its boundaries, and its logits, as far as a loss needs them."""

    streams: list[Tensor]
    logits: Tensor | None = None


class Teacher:
    """Answers for the lesson: from its targets if they were measured, else by running the dense model.

    Raises ValueError if it has to run, and there is none.
    """

    def __init__(self, model: PreTrainedModel | None, lesson: Lesson, settings: Distillation):
        self.lesson, self.temperature = lesson, settings.temperature
        measured = lesson.targets is not None and settings.temperature in lesson.targets.log_normalizers
        self.needs_logits = bool(settings.loss.logit_kl) and not measured
        self.runs = self.needs_logits or settings.loss.needs_hidden_states
        if self.runs and model is None:
            raise ValueError("these loss weights and this temperature need the dense model while training; give teacher")
        self.model = place_teacher(model) if self.runs and model is not None else model
        self.held_out_targets = lesson.held_out_targets

    @torch.no_grad()
    def answer(self, ids: Tensor) -> Answer:
        """The teacher's boundaries and logits for a batch [batch, time], as far as the losses need them."""
        if not self.runs:
            return Answer([])
        assert self.model is not None
        streams: list[Tensor] = []
        with watch_boundaries(self.model, lambda _boundary, stream: streams.append(stream)):
            if self.needs_logits:
                return Answer(streams, self.model(input_ids=ids, use_cache=False).logits)
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1)  # the whole model: it gathers what is shared out
        return Answer(streams)

    def top_tokens(self, rows: Tensor, answer: Answer, device: torch.device) -> TopTokens:
        """The teacher's distribution for windows `rows` of the lesson."""
        if answer.logits is None:
            assert self.lesson.targets is not None
            return self.lesson.targets.top_tokens(rows, device, self.temperature)
        values, ids = answer.logits.topk(min(NUM_TOP, answer.logits.shape[-1]))
        normalizer, _ = find_normalizer(answer.logits, self.temperature)
        return TopTokens(ids, values.float() / self.temperature - normalizer[..., None])

    def measure_held_out(self) -> TeacherTargets:
        """Its targets on the held-out windows, measured at the first call if they were not before."""
        if self.held_out_targets is None:
            assert self.model is not None, "held-out windows without targets need the teacher"
            assert self.lesson.held_out is not None
            self.held_out_targets = measure_targets(self.model, self.lesson.held_out)
        return self.held_out_targets
