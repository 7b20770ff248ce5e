"""What every recipe for one model and corpus shares, measured once: moments, and what the dense model says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from shoal.corpus import Corpus
from shoal.linearity import BlockLinearity, read_scores
from shoal.moments import Moments, measure_moments
from shoal.teacher import TeacherTargets, measure_targets

Listener = Callable[[str, int, int], None]
"""Hears (stage, done, total) while long work goes on."""


def ignore(_stage: str, _done: int, _total: int) -> None:
    """The listener that does nothing."""


def count_on(listen: Listener, stage: str, before: int, total: int) -> Callable[[int], None]:
    """A listener for a part of a stage: it hears how much of the part is done, `before` was done by other parts."""
    return lambda done: listen(stage, before + done, total)


@dataclass(frozen=True)
class Preparation:
    """Moments of the calibration text, and the dense model's targets on the other texts.

    `distillation` targets are worth their time where several students learn from the same text, and `scores` of the
    blocks where several recipes choose among them.
    """

    moments: Moments
    selection: TeacherTargets
    evaluation: tuple[TeacherTargets, ...]
    distillation: TeacherTargets | None = None
    scores: Sequence[BlockLinearity] | None = None

    @classmethod
    def load(cls, folder: Path, num_evaluations: int) -> Preparation:
        """From the files `moments`, `selection`, `evaluation.<i>`, and, if there, `distillation` and `scores.json`."""
        scores, distillation = folder / "scores.json", folder / "distillation.safetensors"
        return cls(
            moments=Moments.load(folder / "moments.safetensors"),
            selection=TeacherTargets.load(folder / "selection.safetensors"),
            evaluation=tuple(TeacherTargets.load(folder / f"evaluation.{i}.safetensors") for i in range(num_evaluations)),
            distillation=TeacherTargets.load(distillation) if distillation.exists() else None,
            scores=read_scores(scores) if scores.exists() else None,
        )


def prepare(model: PreTrainedModel, corpus: Corpus, *, listen: Listener = ignore) -> Preparation:
    """Moments, and the dense model's targets on selection and evaluation text."""
    moments = measure_moments(
        model, corpus.calibration, on_progress=lambda done: listen("moments", done, len(corpus.calibration))
    )
    texts = (corpus.selection, *corpus.evaluation)
    total = sum(len(windows) for windows in texts)
    targets: list[TeacherTargets] = []
    for windows in texts:
        before = sum(len(measured.nll) for measured in targets)
        targets.append(measure_targets(model, windows, on_progress=count_on(listen, "dense model", before, total)))
    return Preparation(moments, targets[0], tuple(targets[1:]))
