"""What happens in a search, on its way to MLflow: written to a spool first, sent by threads in the background.

A tracker that is slow or down never holds up the search. Records that could not be sent, or were refused, are sent at the
next start. Runs, artefacts and the registry each have a lane of their own: an artefact store that does not work holds up
no numbers. Only `sender`, `registry` and `promote` import mlflow.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal_services.tracking.lane import Lane
from shoal_services.tracking.sender import Sender
from shoal_services.tracking.spool import Spool

# What a person calls the records.
NAMES = {"start": "runs", "end": "ends", "orphans": "ends", "artifact": "files", "table": "tables", "version": "models"}
MAX_TOLD = 4


@dataclass(frozen=True)
class Delivery:
    """What became of the records: how many wait and why; how many of which kind were refused, why, and where those are."""

    num_unsent: int = 0
    problem: str | None = None
    refused: Mapping[tuple[str, str], int] = field(default_factory=dict)
    refused_file: Path | None = None

    def complaints(self) -> list[str]:
        """What a person has to know, and to do; nothing where all has arrived."""
        told = []
        if self.num_unsent:
            why = f"({self.problem}); give the same command again when it is up"
            told.append(f"{self.num_unsent} records wait for the tracker {why}")
        if self.refused:
            kinds = [f"{count} {NAMES.get(op, op)}: {why}" for (op, why), count in self.refused.items()]
            more = f"; and {len(kinds) - MAX_TOLD} other reasons" if len(kinds) > MAX_TOLD else ""
            why = "; ".join(kinds[:MAX_TOLD]) + more
            told.append(
                f"{sum(self.refused.values())} records were not taken by the tracker ({why}); they are kept in "
                f"{str(self.refused_file)!r}: mend that, and give the same command again to send them"
            )
        return told


class Tracker:
    """Records in, MLflow runs out. Methods return at once; `close` waits a while for the rest to be sent."""

    def __init__(self, folder: Path, *, uri: str | None, experiment: str):
        self.uri = uri or f"sqlite:///{folder / 'mlflow.db'}"
        self.spool = Spool(folder)

        def connect() -> Sender:
            return Sender(self.uri, experiment, folder)

        runs = Lane("runs", self.spool, connect)
        self._lanes = [runs, *(Lane(name, self.spool, connect, after=runs) for name in ("artefacts", "registry"))]
        for lane in self._lanes:
            lane.thread.start()

    @property
    def identity(self) -> str:
        """Part of its runs' keys: the same for the same folder, and for no other one."""
        return self.spool.identity

    def start_run(self, key: str, name: str, *, parent: str | None = None, params: dict[str, Any] | None = None) -> None:
        """A run with this key, found again or made; `parent` is another run's key."""
        self._record("start", key=key, name=name, parent=parent, params=params or {})

    def log_metrics(self, key: str, metrics: dict[str, float], *, step: int = 0) -> None:
        self._record("metrics", key=key, metrics=metrics, step=step, time_ms=int(time.time() * 1000))

    def log_tags(self, key: str, tags: dict[str, str]) -> None:
        self._record("tags", key=key, tags=tags)

    def log_artifact(self, key: str, path: Path) -> None:
        """A file as it is when the record is sent."""
        self._record("artifact", key=key, path=str(path))

    def log_table(self, key: str, columns: dict[str, list], file_name: str) -> None:
        self._record("table", key=key, columns=columns, file_name=file_name)

    def end_run(self, key: str, status: str) -> None:
        """`status` is FINISHED, FAILED or KILLED."""
        self._record("end", key=key, status=status, time_ms=int(time.time() * 1000))

    def end_orphans(self, parent: str) -> None:
        """Ends every child run that still counts as running."""
        self._record("orphans", key=parent)

    def register(
        self, model: str, key: str, *, source: str, tags: dict[str, str], aliases: list[str],
        about: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        """A version of a registered model for a run's weights (once for the same weights), with aliases moved to it.

        `about` are tags of the registered model itself.
        """
        self._record("version", key=key, model=model, source=source, tags=tags, aliases=aliases, about=about or {})

    def find_ended(self) -> dict[str, bool]:
        """Every run that was started, in this process or in one before it, and whether it was ended since."""
        return self.spool.find_ended()

    @property
    def problem(self) -> str | None:
        """Why records wait, None if none does."""
        return next((lane.problem for lane in self._lanes if lane.problem), None)

    @property
    def num_unsent(self) -> int:
        """Records that MLflow has not got yet."""
        return sum(lane.count_unsent() for lane in self._lanes)

    @property
    def delivery(self) -> Delivery:
        """How it stands with the records."""
        refused = Counter((record["op"], record["refusal"]) for record in self.spool.read_refused())
        return Delivery(self.num_unsent, self.problem, refused, self.spool.refused_file)

    def close(self, *, patience_s: float = 10.0) -> int:
        """Waits until all is sent, or `patience_s` seconds if the tracker does not answer; returns what is left."""
        deadline = time.monotonic() + patience_s
        for lane in self._lanes:
            lane.closing.set()
            lane.wake.set()
        for lane in self._lanes:
            while lane.thread.is_alive() and (time.monotonic() < deadline or lane.is_working):
                lane.thread.join(0.1)
        for lane in self._lanes:
            lane.given_up.set()
        return self.num_unsent

    def _record(self, op: str, **values: Any) -> None:
        self.spool.append({"op": op, **values})
        for lane in self._lanes:
            lane.wake.set()
