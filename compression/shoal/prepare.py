"""What every recipe for one model and corpus shares, measured once: moments, and what the dense model says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from shoal.linearity.accumulate import measure_moments
from shoal.linearity.moments import Moments
from shoal.linearity.scores import BlockLinearity, read_scores
from shoal.measure.targets import TeacherTargets, measure_targets
from shoal.progress import Listener, count_on, ignore
from shoal.text.corpus import Corpus


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
