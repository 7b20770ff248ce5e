"""The folder of a set of trials: what lies where, and what is known of each of them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, cast

from pydantic import ValidationError
from shoal.files import write_once, write_text
from shoal.value import Value

Status = Literal["finished", "collapsed", "stopped", "failed"]
OUT_OF_MEMORY = "out of memory"


class TrialEnd(Value):
    """How a trial ended. `reason` is there if it did not finish; `faults` are what ended its workers before.

    `ended_at` is in seconds since 1970, filled in when it is written.
    """

    key: str
    assignment: dict[str, Any]
    status: Status
    reason: str | None = None
    faults: tuple[str, ...] = ()
    ended_at: float | None = None

    def with_model(self, place: str) -> Self:
        """The same with the folder of its model, if it has one, at another place."""
        return self


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

    def model(self, key: str) -> Path:
        """Where a finished trial's model lies."""
        return self.trial(key) / "model"

    def relative(self, result: R) -> R:
        """A result as it is written: with the folder of its model as seen from the root."""
        return result.with_model(self.model(result.key).relative_to(self.root).as_posix())

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
            result = cast(R, self.result_class.model_validate_json(file.read_text()))
        except ValidationError as error:
            complaint = f"{error.error_count()} errors, first {error.errors()[0]['msg']!r}"
            raise ValueError(
                f"trial result {str(file)!r} is damaged ({complaint}); delete the trial's folder to run it again"
            ) from error
        return result.with_model(str(self.model(key).absolute()))

    def write_result(self, result: R) -> bool:
        """Ends a trial: this file is the last that is written. Of several the first stays; returns whether it is this."""
        self.trial(result.key).mkdir(parents=True, exist_ok=True)
        result = result.model_copy(update={"faults": self.read_faults(result.key), "ended_at": time.time()})
        return write_once(self.trial(result.key) / "result.json", self.relative(result).model_dump_json(indent=2))

    def read_results(self) -> list[R]:
        """All trials that have ended, by key."""
        keys = sorted(path.parent.name for path in (self.root / "trials").glob("*/result.json"))
        return [result for key in keys if (result := self.read_result(key))]

    def has_ended(self, key: str) -> bool:
        """Whether a trial has a result."""
        return (self.trial(key) / "result.json").exists()

    def reopen_failed(self) -> list[str]:
        """Failed trials count as cut off from now on, and their faults as never met; returns their keys."""
        failed = [result for result in self.read_results() if result.status == "failed"]
        for result in failed:
            self.write_started(result.key, result.assignment)
            for name in ("faults.txt", "result.json"):
                (self.trial(result.key) / name).unlink(missing_ok=True)
        return [result.key for result in failed]

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
