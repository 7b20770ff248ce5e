"""Records as calls of an MLflow client. Every record may be sent twice: runs are found again by the tag `shoal.key`."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shoal_services.tracking.registry import KEY_TAG, Weights, connect_tracker, put_version, require_model
from shoal_services.tracking.spool import Record

REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
# MLflow's limits; of parameters, those of servers before 2.8.
MAX_NAME, MAX_PARAM, MAX_TAG, MAX_BATCH = 250, 500, 5000, 100


class Sender:
    """Sends to one experiment. Raises what a tracker raises that takes nothing, or nothing now."""

    def __init__(self, uri: str, experiment: str, folder: Path):
        self.uri, self.experiment, self.folder = uri, experiment, folder
        self.client = connect_tracker(uri)
        self.experiment_id = self._find_experiment()
        self.run_ids: dict[str, str] = {}

    def send(self, record: Record) -> str | None:
        """None, or why MLflow refuses this record for good."""
        from mlflow.exceptions import MlflowException

        send = getattr(self, f"_send_{record['op']}")
        values = {name: value for name, value in record.items() if name != "op"}
        try:
            return send(**values)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
        # Runs or the experiment may have been deleted meanwhile: what comes now then goes into new ones.
        self.run_ids.clear()
        self.experiment_id = self._find_experiment()
        try:
            return send(**values)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            return " ".join(str(error).split())

    def _find_experiment(self) -> str:
        """The experiment's id, found or made. Raises RuntimeError if somebody has deleted it: they may not want it."""
        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            # A local database keeps artefacts beside itself; a server knows its own place for them.
            place = (self.folder / "mlartifacts").as_uri() if self.uri.startswith("sqlite") else None
            return self.client.create_experiment(self.experiment, place)
        if found.lifecycle_stage == "deleted":
            raise RuntimeError(
                f"its experiment {self.experiment!r} was deleted; restore it with `mlflow experiments restore "
                f"--experiment-id {found.experiment_id}`, or remove it with `mlflow gc`"
            )
        return found.experiment_id

    def _find_run(self, key: str) -> str | None:
        if key not in self.run_ids:
            query = f"tags.`{KEY_TAG}` = '{_quotable(key)}'"
            runs = self.client.search_runs([self.experiment_id], query, max_results=1)
            if runs:
                self.run_ids[key] = runs[0].info.run_id
        return self.run_ids.get(key)

    def _run(self, key: str) -> str:
        return self._find_run(key) or self._create(key, key, None)

    def _create(self, key: str, name: str, parent: str | None) -> str:
        tags = {KEY_TAG: _quotable(key)} | ({"mlflow.parentRunId": self._run(parent)} if parent else {})
        self.run_ids[key] = self.client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id
        return self.run_ids[key]

    def _send_start(self, key: str, name: str, parent: str | None, params: dict[str, Any]) -> None:
        """A parameter never changes in MLflow: another value (more trials than at first) becomes a tag of its name."""
        from mlflow.entities import Param

        run_id = self._find_run(key) or self._create(key, name, parent)
        self.client.update_run(run_id, status="RUNNING")
        told = {_clean(name): _cut(str(value), MAX_PARAM) for name, value in params.items()}
        held = self.client.get_run(run_id).data.params if told else {}
        for batch in _split({name: value for name, value in told.items() if name not in held}):
            self.client.log_batch(run_id, params=[Param(*item) for item in batch])
        self._send_tags(key, {name: value for name, value in told.items() if held.get(name, value) != value})

    def _send_metrics(self, key: str, metrics: dict[str, float], step: int, time_ms: int) -> None:
        from mlflow.entities import Metric

        for batch in _split(metrics):
            self.client.log_batch(self._run(key), metrics=[Metric(_clean(k), v, time_ms, step) for k, v in batch])

    def _send_tags(self, key: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        for batch in _split(tags):
            self.client.log_batch(self._run(key), tags=[RunTag(_clean(k), _cut(v, MAX_TAG)) for k, v in batch])

    def _send_artifact(self, key: str, path: str) -> str | None:
        if not Path(path).exists():
            return None
        run_id = self._find_run(key)
        if run_id is None:
            return NO_RUN
        self.client.log_artifact(run_id, path)
        return None

    def _send_table(self, key: str, columns: dict[str, list], file_name: str) -> str | None:
        run_id = self._find_run(key)
        if run_id is None:
            return NO_RUN
        self.client.log_text(run_id, json.dumps({"columns": list(columns), "data": _rows(columns)}), file_name)
        return None

    def _send_end(self, key: str, status: str, time_ms: int) -> None:
        self.client.set_terminated(self._run(key), status, end_time=time_ms)

    def _send_orphans(self, key: str) -> None:
        query = f"tags.mlflow.parentRunId = '{self._run(key)}' and attributes.status = 'RUNNING'"
        while runs := self.client.search_runs([self.experiment_id], query):
            for run in runs:
                self.client.set_terminated(run.info.run_id, "KILLED")

    def _send_version(
        self, key: str, model: str, source: str, tags: dict[str, str], aliases: list[str],
        about: Mapping[str, str] = {},
    ) -> str | None:  # fmt: skip
        run_id = self._find_run(key)
        if run_id is None:
            return NO_RUN
        require_model(self.client, model, about)
        version = put_version(
            self.client, model, Weights(source, tags.get("sha256") or None, {KEY_TAG: key, **tags}, run_id)
        )
        for alias in aliases:
            self.client.set_registered_model_alias(model, alias, version)
        return None


NO_RUN = "its run is not there"


def _quotable(key: str) -> str:
    """A run's key as it can stand in a query."""
    return key.replace("'", "’")


def _split(values: dict[str, Any]) -> Iterator[list[tuple[str, Any]]]:
    """As many at a time as a call may carry."""
    items = list(values.items())
    return (items[start : start + MAX_BATCH] for start in range(0, len(items), MAX_BATCH))


def _clean(name: str) -> str:
    """A name of a parameter, metric or tag that MLflow takes."""
    plain = posixpath.normpath(re.sub(r"[^\w\-./ :]", "_", name)).lstrip("./")
    return plain[:MAX_NAME] or "_"


def _cut(text: str, limit: int) -> str:
    """A text within a limit, and a sign where it was cut."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _rows(columns: dict[str, list]) -> list[list]:
    """Columns as the rows of an MLflow table artefact."""
    return [list(row) for row in zip(*columns.values(), strict=True)]
