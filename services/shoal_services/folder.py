"""The folder of one search: what lies where, and what has been finished.

config.json                 what is searched; a second search of this name must agree
prepared/                   token windows, moments, the dense model's targets: shared by all trials
fits/<key>.safetensors      fitted replacements, shared by trials that differ in distillation alone
trials/<key>/               result.json, model/ (while on the frontier), train/ (checkpoints, while running)
mlflow.db  mlartifacts/     tracking, unless a server is named
frontier.json  frontier.html  linearity.json  linearity.html
curves.html                 of a grid: quality over the number of changed blocks
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

from pydantic import ValidationError
from shoal.files import write_text
from shoal.frontier import find_frontier
from shoal.recipe import Point, Value

from shoal_services.config import SearchConfig
from shoal_services.registry import PROMOTED

Status = Literal["finished", "collapsed", "stopped", "failed"]
OUT_OF_MEMORY = "out of memory"


class TrialEnd(Value):
    """How a trial ended. `reason` is there if it did not finish; `faults` are what ended its workers before."""

    key: str
    assignment: dict[str, Any]
    status: Status
    reason: str | None = None
    faults: tuple[str, ...] = ()


class TrialResult(TrialEnd):
    """How a search's trial ended. `point` is there if it finished."""

    point: Point | None = None
    held_out_perplexity: float | None = None


R = TypeVar("R", bound="TrialEnd")


@dataclass(frozen=True)
class TrialFolder(Generic[R]):
    """Paths inside the folder of a set of trials, and what is known of each: begun, or ended with a result `R`."""

    root: Path
    result_class: ClassVar[type[TrialEnd]]

    @property
    def prepared(self) -> Path:
        return self.root / "prepared"

    def trial(self, key: str) -> Path:
        return self.root / "trials" / key

    def claim(self, name: str, science: dict[str, Any], *, extensible: str) -> None:
        """Makes the folder, or goes on in it; the part `extensible` of the configuration may differ from before.

        Raises ValueError if it holds something else of the same name, OSError if it cannot be written.
        """
        for folder in (self.prepared, self.root / "trials"):
            folder.mkdir(parents=True, exist_ok=True)
        file = self.root / "config.json"
        if file.exists():
            try:
                held = json.loads(file.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{str(file)!r} is damaged ({error}); delete it to go on") from error
            different = sorted(key for key in {*held, *science} - {extensible} if held.get(key) != science.get(key))
            if different:
                raise ValueError(
                    f"{str(self.root)!r} holds another search named {name!r}: {', '.join(different)} differ; "
                    "choose another name, or delete the folder"
                )
        write_text(file, json.dumps(science, indent=2))

    def read_result(self, key: str) -> R | None:
        """A trial's result, None if it has not ended. Raises ValueError if the file is damaged."""
        file = self.trial(key) / "result.json"
        if not file.exists():
            return None
        try:
            return cast(R, self.result_class.model_validate_json(file.read_text()))
        except ValidationError as error:
            complaint = f"{error.error_count()} errors, first {error.errors()[0]['msg']!r}"
            raise ValueError(
                f"trial result {str(file)!r} is damaged ({complaint}); delete the trial's folder to run it again"
            ) from error

    def write_result(self, result: R) -> None:
        """Ends a trial: this file is the last that is written."""
        self.trial(result.key).mkdir(parents=True, exist_ok=True)
        result = result.model_copy(update={"faults": self.read_faults(result.key)})
        write_text(self.trial(result.key) / "result.json", result.model_dump_json(indent=2))

    def read_results(self) -> list[R]:
        """All trials that have ended, by key."""
        keys = sorted(path.parent.name for path in (self.root / "trials").glob("*/result.json"))
        return [result for key in keys if (result := self.read_result(key))]

    def read_started(self) -> dict[str, dict[str, Any]]:
        """Assignments of trials that were started and have not ended, by key."""
        files = (self.root / "trials").glob("*/assignment.json")
        return {f.parent.name: json.loads(f.read_text()) for f in files if not (f.parent / "result.json").exists()}

    def note_fault(self, key: str, fault: str) -> None:
        """Remembers what ended the workers of a trial that is not over."""
        with (self.trial(key) / "faults.txt").open("a", encoding="utf-8") as file:
            file.write(f"{fault}\n")

    def read_faults(self, key: str) -> tuple[str, ...]:
        """What ended workers of a trial so far."""
        file = self.trial(key) / "faults.txt"
        return tuple(file.read_text(encoding="utf-8").splitlines()) if file.exists() else ()

    def write_started(self, key: str, assignment: dict[str, Any]) -> None:
        """Notes that a trial has begun, so that a later start of the search begins with it."""
        self.trial(key).mkdir(parents=True, exist_ok=True)
        write_text(self.trial(key) / "assignment.json", json.dumps(assignment))


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
        """The points of all finished trials."""
        return [result.point for result in self.read_results() if result.point]

    def drop_dominated_models(self) -> None:
        """Deletes the weights of trials that are off the frontier, unless they were promoted; their numbers stay."""
        points = self.find_points()
        kept = {point.artefact for point in find_frontier(points)}
        for point in points:
            if point.artefact and point.artefact not in kept and not (Path(point.artefact) / PROMOTED).exists():
                shutil.rmtree(point.artefact, ignore_errors=True)


class ProgressFile:
    """A listener that writes (stage, done, total) to a file, at most twice a second: readers need no connection."""

    def __init__(self, path: Path):
        self.path = path
        self.written_at, self.stage = 0.0, ""
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage or done >= total or now - self.written_at > 0.5:
            self.written_at, self.stage = now, stage
            write_text(self.path, json.dumps({"stage": stage, "done": done, "total": total}))


def read_progress(path: Path) -> tuple[str, int, int] | None:
    """What a `ProgressFile` last wrote, None before that."""
    try:
        progress = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return progress["stage"], progress["done"], progress["total"]
