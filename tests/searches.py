"""Searches run by the command line in processes of their own, for tests and for `faults.py`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import yaml
from mlflow.entities import Run
from shoal_services.search.folder import RunFolder
from shoal_services.tracking.registry import KEY_TAG

SHOAL = Path(sys.executable).with_name("shoal")
SMOKE = Path(__file__).parents[1] / "tune_configs" / "smoke.yaml"
LIMIT_S = 600


@dataclass
class Search:
    """The smoke search with changes, in a storage of its own, run by the command line in processes of its own."""

    config: Path
    storage: Path
    environment: dict[str, str] = field(default_factory=lambda: {**os.environ, "COLUMNS": "160"})
    tracking_uri: str | None = None
    cwd: Path | None = None

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.storage / "smoke")

    def start(self, *options: str) -> subprocess.Popen[str]:
        command = [str(SHOAL), "search", str(self.config), "--storage", str(self.storage), "--num-cpus", "2", *options]
        command += ["--tracking-uri", self.tracking_uri] if self.tracking_uri else []
        return subprocess.Popen(
            command, env=self.environment, cwd=self.cwd, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=(self.storage / "stderr.txt").open("w"),
        )  # fmt: skip

    def run(self, *options: str) -> str:
        """What the whole search prints to its standard output."""
        process = self.start(*options)
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        finally:
            end_tree(process)
        assert process.returncode == 0, self.errors()
        return output

    def errors(self) -> str:
        return (self.storage / "stderr.txt").read_text()

    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.tracking_uri or f"sqlite:///{self.folder.root / 'mlflow.db'}")

    def runs(self) -> tuple[Run, dict[str, Run]]:
        """The parent's run, and the trials' runs by trial key."""
        client = self.client()
        experiment = client.get_experiment_by_name("shoal-smoke")
        runs = client.search_runs([experiment.experiment_id])
        (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert len(children) == len(runs) - 1
        keyed = {run.data.tags[KEY_TAG].rpartition("/")[2]: run for run in children}
        assert len(keyed) == len(children), "one run a key"
        return parent, keyed


def write_search(folder: Path, **changes: dict[str, Any]) -> Search:
    """The smoke search with changed sections, and its storage, in a folder."""
    data = yaml.safe_load(SMOKE.read_text())
    for section, values in changes.items():
        data[section] = {**data.get(section, {}), **values}
    config = folder / "smoke.yaml"
    config.write_text(yaml.safe_dump(data))
    (folder / "storage").mkdir()
    return Search(config, folder / "storage")


def end_tree(process: subprocess.Popen, known: list[psutil.Process] | None = None) -> None:
    """Ends a search and the Ray processes that it started, and no others."""
    family = list(known or [])
    if process.poll() is None:
        family += psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
    for member in family:
        if member.is_running():  # the same process, not another one of its number
            member.kill()
    psutil.wait_procs(family, timeout=10)


def wait_until(happened: Callable[[], Any], process: subprocess.Popen, search: Search) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happened():
        assert process.poll() is None, search.errors()
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def closed_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_whole(search: Search, num_trials: int) -> None:
    """Every trial once, all finished, in the folder and in MLflow alike, and nothing that still runs."""
    results = search.folder.read_results()
    assert [result.status for result in results] == ["finished"] * num_trials
    assert search.folder.read_started() == {}
    assert Counter(result.point.recipe.key for result in results).most_common(1)[0][1] == 1
    parent, children = search.runs()
    assert parent.info.status == "FINISHED"
    assert {key: run.info.status for key, run in children.items()} == {result.key: "FINISHED" for result in results}
    for result in results:
        assert children[result.key].data.metrics["perplexity"] == pytest.approx(result.point.perplexity)
