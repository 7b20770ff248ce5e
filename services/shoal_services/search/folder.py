"""The folder of one search: what lies where, and what has been finished.

config.json                 what is searched; a second search of this name must agree
prepared/                   token windows, moments, the dense model's targets: shared by all trials
fits/<key>.safetensors      fitted replacements, shared by trials that differ in distillation alone
trials/<key>/               result.json, model/ (while on the frontier, or `registered`), train/ (while running)
mlflow.db  mlartifacts/     tracking, unless a server is named
frontier.json  frontier.html  linearity.json  linearity.html
curves.html                 of a grid: quality over the number of changed blocks
lock  lock.json             who works in it (see `shoal_services.training.lock`)

Paths in these files are relative to the folder: it can be moved, and a copy of it has models of its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Self

from shoal.files import write_text
from shoal.frontier import find_frontier
from shoal.point import Point

from shoal_services.search.config import SearchConfig
from shoal_services.tracking.registry import PROMOTED
from shoal_services.training.folder import TrialEnd, TrialFolder


class TrialResult(TrialEnd):
    """How a search's trial ended. `point` is there if it finished."""

    point: Point | None = None
    held_out_perplexity: float | None = None

    def with_model(self, place: str) -> Self:
        if self.point is None or self.point.artefact is None:
            return self
        return self.model_copy(update={"point": self.point.model_copy(update={"artefact": place})})


class RunFolder(TrialFolder[TrialResult]):
    """The folder of one search."""

    result_class = TrialResult

    @property
    def fits(self) -> Path:
        return self.root / "fits"

    @property
    def scores(self) -> Path:
        """How linear each block is."""
        return self.prepared / "scores.json"

    @property
    def dense_tasks(self) -> Path:
        """What the dense model scored in the tasks."""
        return self.prepared / "tasks.json"

    def claim_search(self, config: SearchConfig) -> None:
        """Makes the folder, or goes on in it; a search may ask for more trials than before. Raises as `claim` does."""
        self.claim(config.name, config.science, extensible="search")
        self.fits.mkdir(exist_ok=True)

    def find_points(self) -> list[Point]:
        """The points of all finished trials, in the order in which they ended."""
        return [result.point for result in self._read_finished() if result.point]

    def mark_registered(self, key: str, model: str) -> None:
        """Notes beside a trial's model that a registry names it: its weights are kept from now on."""
        write_text(self.trial(key) / "registered", f"{model}\n")

    def drop_dominated_models(self) -> None:
        """Deletes the weights of trials that are off the frontier, in no registry and not promoted; their numbers stay."""
        finished, root = self._read_finished(), self.root.resolve()
        kept = {point.artefact for point in find_frontier([result.point for result in finished if result.point])}
        for result in finished:
            model = self.model(result.key)
            marks = (self.trial(result.key) / "registered", model / PROMOTED)
            is_named = str(model.absolute()) in kept or any(mark.exists() for mark in marks)
            if not is_named and model.resolve().is_relative_to(root):  # a link may lead to another search's models
                shutil.rmtree(model, ignore_errors=True)

    def _read_finished(self) -> list[TrialResult]:
        """In order of time; results without one, of earlier versions, have that of their file."""
        finished = [result for result in self.read_results() if result.point]
        return sorted(finished, key=lambda r: r.ended_at or (self.trial(r.key) / "result.json").stat().st_mtime)
