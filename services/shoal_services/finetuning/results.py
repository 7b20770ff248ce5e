"""What came out: each seed's accuracy and the linearity of its blocks, beside the model before.

config.json   before.json   trials/seed-N/{result.json, model/}   finetuning.json   linearity.html
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from shoal.linearity.profile import Profile
from shoal.linearity.scores import BlockLinearity
from shoal.texts import Text

from shoal_services.finetuning.config import FinetuneConfig
from shoal_services.training.estimate import Estimate
from shoal_services.training.folder import TrialEnd, TrialFolder

MEASURES = ("score", "score_without_residual", "held_out", "held_out_without_residual")


class FinetuneResult(TrialEnd):
    """How a seed's run ended. If it finished: accuracy on held-out examples, the blocks' linearity, and the model."""

    accuracy: float | None = None
    accuracy_standard_error: float | None = None
    held_out_loss: float | None = None
    num_held_out: int | None = None
    blocks: tuple[dict[str, Any], ...] = ()
    model: str | None = None

    def with_model(self, place: str) -> Self:
        return self.model_copy(update={"model": self.model and place})

    def scores(self) -> list[BlockLinearity]:
        """The blocks' linearity."""
        return [BlockLinearity(**block) for block in self.blocks]


class FinetuneFolder(TrialFolder[FinetuneResult]):
    """The folder of one fine-tuning."""

    result_class = FinetuneResult

    @property
    def before(self) -> Path:
        """The linearity of the model as it came."""
        return self.root / "before.json"


@dataclass(frozen=True)
class Finetuned:
    """The blocks before, and the seeds that have finished."""

    config: FinetuneConfig
    text: Text
    before: list[BlockLinearity]
    results: list[FinetuneResult]

    @classmethod
    def read(cls, config: FinetuneConfig, folder: FinetuneFolder) -> Self:
        """What the folder holds, of the seeds that are asked for."""
        before = json.loads(folder.before.read_text())
        keys = {config.trial_key(assignment) for assignment in config.assignments()}
        results = [result for result in folder.read_results() if result.status == "finished" and result.key in keys]
        scores = [BlockLinearity(**score) for score in before["blocks"]]
        return cls(config, Text(**before["text"]), scores, sorted(results, key=lambda r: r.assignment["seed"]))

    def change(self, field: str) -> Estimate:
        """After − before of a score's mean over the blocks, over the seeds: Table 1 of arXiv 2405.12250."""
        before = mean_over_blocks(self.before, field)
        return Estimate.of([mean_over_blocks(result.scores(), field) - before for result in self.results])

    def profiles(self) -> list[Profile]:
        """The model before, then after each seed, for a page that compares them."""
        named = {self.config.model: self.before} | {result.key: result.scores() for result in self.results}
        return [Profile(name, self.text, scores, [], [], []) for name, scores in named.items()]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: what was done, the changes, and each seed."""
        return {
            "config": self.config.science, "text": self.text.model_dump(),
            "before": [dataclasses.asdict(score) for score in self.before],
            "change": {field: dataclasses.asdict(self.change(field)) for field in MEASURES},
            "seeds": [json.loads(r.with_model(f"trials/{r.key}/model").model_dump_json()) for r in self.results],
        }  # fmt: skip


def mean_over_blocks(scores: list[BlockLinearity], field: str) -> float:
    """A score, mean over all blocks."""
    return statistics.fmean(getattr(score, field) for score in scores)
