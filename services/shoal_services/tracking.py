"""What happens in a search, on its way to MLflow: written to a spool file first, sent by a thread in the background.

A tracker that is slow or down never holds up the search. Records that could not be sent are sent at the next
start. Runs are found again by the tag `shoal.key`, so replaying makes no second run. Only this file and `registry` import
mlflow.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.files import write_text

from shoal_services.registry import PLACE_TAG, connect_tracker, explain_failure

KEY_TAG = "shoal.key"
RETRY_EVERY_S = 5.0
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")


class Tracker:
    """Records in, MLflow runs out. Methods return at once; `close` waits a while for the rest to be sent."""

    def __init__(self, folder: Path, *, uri: str | None, experiment: str):
        self.folder, self.experiment = folder, experiment
        self.uri = uri or f"sqlite:///{folder / 'mlflow.db'}"
        self.spool, self.position_file = folder / "tracking.jsonl", folder / "tracking.position"
        self.problem: str | None = None
        self._lock = threading.Lock()
        self._wake, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        _drop_torn_line(self.spool)
        self._thread = threading.Thread(target=self._send_forever, name="tracking", daemon=True)
        self._thread.start()

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

    def register(self, model: str, key: str, *, source: str, tags: dict[str, str], aliases: list[str]) -> None:
        """A version of a registered model for a run's weights (once for a key), with aliases moved to it."""
        self._record("version", key=key, model=model, source=source, tags=tags, aliases=aliases)

    def ended_runs(self) -> set[str]:
        """Keys of the runs that were ended and not started again since, in this process or in one before it."""
        ended: set[str] = set()
        if self.spool.exists():
            for record in map(json.loads, self.spool.read_text(encoding="utf-8").splitlines()):
                if record["op"] == "end":
                    ended.add(record["key"])
                elif record["op"] == "start":
                    ended.discard(record["key"])
        return ended

    @property
    def num_unsent(self) -> int:
        """Records that MLflow has not got yet."""
        if not self.spool.exists():
            return 0
        with self.spool.open("rb") as file:
            file.seek(self._read_position())
            return sum(1 for _ in file)

    def close(self, *, patience_s: float = 10.0) -> int:
        """Waits until all is sent, or `patience_s` seconds if the tracker does not answer; returns what is left."""
        self._closing.set()
        self._wake.set()
        deadline = time.monotonic() + patience_s
        while self._thread.is_alive() and (time.monotonic() < deadline or not self.problem):
            self._thread.join(0.2)
        self._given_up.set()
        return self.num_unsent

    def _record(self, op: str, **values: Any) -> None:
        with self._lock, self.spool.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"op": op, **values}) + "\n")
        self._wake.set()

    def _read_position(self) -> int:
        return int(self.position_file.read_text() or 0) if self.position_file.exists() else 0

    def _send_forever(self) -> None:
        sender: _Sender | None = None
        while True:
            self._wake.clear()
            try:
                sender = sender or _Sender(self.uri, self.experiment, self.folder)
                for record, end in self._unsent():
                    if refusal := sender.send(record):
                        self._keep_refused(record, refusal)
                    write_text(self.position_file, str(end))
                self.problem = None
            # Whatever a tracker raises (network, database, server errors), the search goes on and the record stays.
            except Exception as error:
                self.problem = explain_failure(error)
                if self._closing.wait(RETRY_EVERY_S) and self._given_up.wait(1):
                    return
                continue
            if self._closing.is_set() and not self._wake.is_set():
                return
            self._wake.wait()

    def _keep_refused(self, record: dict[str, Any], refusal: str) -> None:
        """A record that MLflow will never take must not hold up those behind it."""
        with (self.folder / "tracking.refused.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, "refusal": refusal}) + "\n")

    def _unsent(self) -> Iterator[tuple[dict[str, Any], int]]:
        if not self.spool.exists():
            return
        with self.spool.open("rb") as file:
            file.seek(self._read_position())
            while line := file.readline():
                if not line.endswith(b"\n"):
                    return
                yield json.loads(line), file.tell()


def _drop_torn_line(spool: Path) -> None:
    """A process that was killed while writing leaves half a line at the end."""
    if spool.exists():
        data = spool.read_bytes()
        if data and not data.endswith(b"\n"):
            spool.write_bytes(data[: data.rfind(b"\n") + 1])


class _Sender:
    """Sends one record at a time with an MLflow client; every record may be sent twice."""

    def __init__(self, uri: str, experiment: str, folder: Path):
        self.uri, self.client = uri, connect_tracker(uri)
        found = self.client.get_experiment_by_name(experiment)
        # A local database keeps artefacts beside itself; a server knows its own place for them.
        place = (folder / "mlartifacts").as_uri() if uri.startswith("sqlite") else None
        self.experiment_id = found.experiment_id if found else self.client.create_experiment(experiment, place)
        self.run_ids: dict[str, str] = {}

    def send(self, record: dict[str, Any]) -> str | None:
        """None, or why MLflow refuses this record for good. Raises whatever a failing connection raises."""
        from mlflow.exceptions import MlflowException

        try:
            getattr(self, f"_send_{record['op']}")(**{name: value for name, value in record.items() if name != "op"})
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            return str(error)
        return None

    def _find_run(self, key: str) -> str | None:
        if key not in self.run_ids:
            runs = self.client.search_runs([self.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
            if runs:
                self.run_ids[key] = runs[0].info.run_id
        return self.run_ids.get(key)

    def _run(self, key: str) -> str:
        run_id = self._find_run(key)
        return run_id or self._create(key, key, None)

    def _create(self, key: str, name: str, parent: str | None) -> str:
        tags = {KEY_TAG: key} | ({"mlflow.parentRunId": self._run(parent)} if parent else {})
        self.run_ids[key] = self.client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id
        return self.run_ids[key]

    def _send_start(self, key: str, name: str, parent: str | None, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        run_id = self._find_run(key) or self._create(key, name, parent)
        self.client.update_run(run_id, status="RUNNING")
        self.client.log_batch(run_id, params=[Param(name, str(value)[:500]) for name, value in params.items()])

    def _send_metrics(self, key: str, metrics: dict[str, float], step: int, time_ms: int) -> None:
        from mlflow.entities import Metric

        self.client.log_batch(self._run(key), metrics=[Metric(k, v, time_ms, step) for k, v in metrics.items()])

    def _send_tags(self, key: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self._run(key), tags=[RunTag(k, v[:5000]) for k, v in tags.items()])

    def _send_artifact(self, key: str, path: str) -> None:
        if Path(path).exists():
            self.client.log_artifact(self._run(key), path)

    def _send_table(self, key: str, columns: dict[str, list], file_name: str) -> None:
        self.client.log_text(self._run(key), json.dumps({"columns": list(columns), "data": _rows(columns)}), file_name)

    def _send_end(self, key: str, status: str, time_ms: int) -> None:
        self.client.set_terminated(self._run(key), status, end_time=time_ms)

    def _send_orphans(self, key: str) -> None:
        parent = self._run(key)
        query = f"tags.mlflow.parentRunId = '{parent}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([self.experiment_id], query):
            self.client.set_terminated(run.info.run_id, "KILLED")

    def _send_version(self, key: str, model: str, source: str, tags: dict[str, str], aliases: list[str]) -> None:
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):  # it exists
            self.client.create_registered_model(model)
        versions = self.client.search_model_versions(f"name = '{model}'")
        same = [v for v in versions if v.tags.get(KEY_TAG) == key and source in (v.source, v.tags.get(PLACE_TAG))]
        run_id = self._run(key)
        # A server refuses paths of its clients: there the run is the source, and the tag tells where the weights are.
        accepted = source if self.uri.startswith("sqlite") or "://" in source else f"runs:/{run_id}/model"
        version = same[0] if same else self.client.create_model_version(
            model, accepted, run_id=run_id, tags={KEY_TAG: key, PLACE_TAG: source, **tags}
        )  # fmt: skip
        for alias in aliases:
            self.client.set_registered_model_alias(model, alias, version.version)


def _rows(columns: dict[str, list]) -> list[list]:
    """Columns as the rows of an MLflow table artefact."""
    return [list(row) for row in zip(*columns.values(), strict=True)]
