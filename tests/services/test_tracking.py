"""Records reach MLflow once each, in their order; a tracker that is slow, down or picky holds nothing up."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import mlflow
import psutil
import pytest
from mlflow.entities import Run
from safetensors.torch import save_file
from shoal.checkpoints.hashes import hash_folder
from shoal_services.tracking.promote import promote
from shoal_services.tracking.registry import HASH_TAG, KEY_TAG, PLACE_TAG, find_registered, ping
from shoal_services.tracking.tracker import Tracker
from torch import tensor

MODEL = "shoal-tiny"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def folder(empty_database: Path, tmp_path: Path) -> Path:
    """A search's folder with an empty database."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path


def open_tracker(folder: Path, uri: str | None = None) -> Tracker:
    return Tracker(folder, uri=uri, experiment="shoal-mine")


def client_of(folder: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def runs_of(client: mlflow.MlflowClient) -> dict[str, Run]:
    """All runs by key; no two have one key."""
    runs = client.search_runs([client.get_experiment_by_name("shoal-mine").experiment_id])
    keyed = {run.data.tags[KEY_TAG]: run for run in runs}
    assert len(keyed) == len(runs)
    return keyed


def record_search(tracker: Tracker, folder: Path) -> None:
    """What a search of two trials tells."""
    tracker.start_run("mine", "mine", params={"model": "tiny", "space.kind": ["linear", "folded"]})
    for key, status in (("a", "FINISHED"), ("b", "FAILED")):
        tracker.start_run(f"mine/{key}", f"trial {key}", parent="mine", params={"num_replaced": 2})
        for step in (0, 5, 10):
            tracker.log_metrics(f"mine/{key}", {"loss": 10.0 - step, "system/memory": 1.0}, step=step)
        tracker.log_tags(f"mine/{key}", {"blocks": "(1, 2)"})
        (folder / "result.json").write_text('{"key": 1}')
        tracker.log_artifact(f"mine/{key}", folder / "result.json")
        tracker.end_run(f"mine/{key}", status)
    tracker.log_table("mine", {"kind": ["linear", "folded"], "perplexity": [1.0, 2.0]}, "frontier-table.json")
    tracker.register(MODEL, "mine", source="/models/dense", tags={"kind": "dense"}, aliases=["dense"])
    tracker.register(MODEL, "mine/a", source="/models/a", tags={"kind": "linear"}, aliases=["best", "smallest"])
    tracker.end_run("mine", "FINISHED")


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def assert_search_is_there(client: mlflow.MlflowClient) -> None:
    runs = runs_of(client)
    assert set(runs) == {"mine", "mine/a", "mine/b"}
    assert {key: run.info.status for key, run in runs.items()} == {
        "mine": "FINISHED",
        "mine/a": "FINISHED",
        "mine/b": "FAILED",
    }
    assert runs["mine"].data.params == {"model": "tiny", "space.kind": "['linear', 'folded']"}
    for key in ("mine/a", "mine/b"):
        run = runs[key]
        assert run.info.run_name == f"trial {key[-1]}"
        assert run.data.tags["mlflow.parentRunId"] == runs["mine"].info.run_id
        assert run.data.params == {"num_replaced": "2"} and run.data.tags["blocks"] == "(1, 2)"
        course = client.get_metric_history(run.info.run_id, "loss")
        assert [(metric.step, metric.value) for metric in course] == [(0, 10.0), (5, 5.0), (10, 0.0)]
        assert run.data.metrics == {"loss": 0.0, "system/memory": 1.0}
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["result.json"]
    assert [file.path for file in client.list_artifacts(runs["mine"].info.run_id)] == ["frontier-table.json"]
    versions = client.search_model_versions(f"name = '{MODEL}'")
    assert {version.tags[PLACE_TAG]: version.run_id for version in versions} == {
        "/models/dense": runs["mine"].info.run_id, "/models/a": runs["mine/a"].info.run_id,
    }  # fmt: skip
    assert len(versions) == 2
    for alias, source in (("dense", "/models/dense"), ("best", "/models/a"), ("smallest", "/models/a")):
        assert client.get_model_version_by_alias(MODEL, alias).tags[PLACE_TAG] == source


def test_a_search_arrives_whole(tmp_path):
    tracker = open_tracker(tmp_path)
    record_search(tracker, tmp_path)
    assert tracker.close() == 0
    assert tracker.problem is None
    assert not (tmp_path / "tracking.refused.jsonl").exists()
    assert_search_is_there(client_of(tmp_path))


def test_the_same_records_again_make_nothing_twice(folder):
    """Another start of the search tells the same."""
    for _ in range(2):
        tracker = open_tracker(folder)
        record_search(tracker, folder)
        assert tracker.close() == 0
    client = client_of(folder)
    assert len(runs_of(client)) == 3
    assert len(client.search_model_versions(f"name = '{MODEL}'")) == 2
    assert {run.info.status for run in runs_of(client).values()} == {"FINISHED", "FAILED"}


def test_records_that_are_sent_twice_arrive_once(folder):
    """The note of what was sent is lost: all is sent again."""
    tracker = open_tracker(folder)
    record_search(tracker, folder)
    tracker.close()
    for note in ("", None):
        for file in folder.glob("tracking.*.position"):
            file.unlink() if note is None else file.write_text(note)
        assert open_tracker(folder).close() == 0
        assert_search_is_there(client_of(folder))


def test_a_run_that_ended_runs_again_when_it_is_started_again(folder):
    for status in ("KILLED", "FINISHED"):
        tracker = open_tracker(folder)
        tracker.start_run("mine", "mine")
        tracker.end_run("mine", status)
        tracker.close()
        assert runs_of(client_of(folder))["mine"].info.status == status


def test_aliases_move_to_the_latest_version(folder):
    tracker = open_tracker(folder)
    for key in ("mine", "mine/a", "mine/b"):
        tracker.start_run(key, key)
    tracker.register(MODEL, "mine/a", source="/models/a", tags={}, aliases=["best", "smallest"])
    tracker.register(MODEL, "mine/b", source="/models/b", tags={}, aliases=["best"])
    tracker.register(MODEL, "mine/a", source="/models/a", tags={}, aliases=["smallest"])
    assert tracker.close() == 0
    client = client_of(folder)
    assert client.get_model_version_by_alias(MODEL, "best").source == "/models/b"
    assert client.get_model_version_by_alias(MODEL, "smallest").source == "/models/a"
    assert len(client.search_model_versions(f"name = '{MODEL}'")) == 2


def test_orphans_end_and_the_others_stay(folder):
    tracker = open_tracker(folder)
    for parent in ("mine", "other"):
        tracker.start_run(parent, parent)
        for key in "ab":
            tracker.start_run(f"{parent}/{key}", key, parent=parent)
    tracker.end_run("mine/a", "FINISHED")
    tracker.end_orphans("mine")
    tracker.close()
    assert {key: run.info.status for key, run in runs_of(client_of(folder)).items()} == {
        "mine": "RUNNING", "mine/a": "FINISHED", "mine/b": "KILLED",
        "other": "RUNNING", "other/a": "RUNNING", "other/b": "RUNNING",
    }  # fmt: skip


def test_which_runs_have_ended_is_known_without_mlflow(tmp_path):
    tracker = open_tracker(tmp_path, f"http://127.0.0.1:{free_port()}")
    assert tracker.find_ended() == {}
    for key in "abc":
        tracker.start_run(key, key)
    for key in "ab":
        tracker.end_run(key, "FINISHED")
    tracker.start_run("a", "a")
    assert tracker.find_ended() == {"a": False, "b": True, "c": False}
    assert tracker.close(patience_s=0) == 6


def test_a_tracker_that_is_down_holds_nothing_up_and_gets_all_later(folder):
    tracker = open_tracker(folder, f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    record_search(tracker, folder)
    assert time.monotonic() - started < 0.5
    num_records = len((folder / "tracking.jsonl").read_text().splitlines())
    assert tracker.close(patience_s=2) == tracker.num_unsent == num_records
    assert time.monotonic() - started < 20
    assert "refused" in tracker.problem or "Max retries" in tracker.problem
    for lane in tracker._lanes:
        lane.thread.join(10)
        assert not lane.thread.is_alive(), "nobody tries again behind the back of those who gave up"

    later = open_tracker(folder)
    assert later.close() == 0
    assert_search_is_there(client_of(folder))


def test_a_torn_line_is_dropped_and_the_rest_is_sent(folder):
    down = open_tracker(folder, f"http://127.0.0.1:{free_port()}")
    record_search(down, folder)
    num_records = down.close(patience_s=0)
    with (folder / "tracking.jsonl").open("a") as spool:
        spool.write('{"op": "tags", "key": "mine", "ta')
    tracker = open_tracker(folder)
    assert tracker.close() == 0
    assert_search_is_there(client_of(folder))
    assert len((folder / "tracking.jsonl").read_text().splitlines()) == num_records


def test_what_mlflow_would_refuse_of_names_and_values_arrives(folder):
    tracker = open_tracker(folder)
    tracker.start_run(
        "it's",
        "mine",
        params={"model": "tiny", "trials": 2, "long": "x" * 9000, "odd?": 1} | {f"p{i}": i for i in range(150)},
    )
    tracker.start_run("it's", "mine", params={"model": "tiny", "trials": 4})  # a param cannot change
    tracker.log_metrics("it's", {"acc@1?!": 1.0, "../up": 2.0, "a//b": 3.0, "n" * 300: 4.0})
    tracker.log_tags("it's", {"reason?": "r" * 9000})
    tracker.end_run("it's", "FINISHED")
    assert tracker.close() == 0
    assert tracker.delivery.complaints() == []
    (run,) = runs_of(client_of(folder)).values()
    assert (run.data.params["trials"], run.data.tags["trials"], "model" in run.data.tags) == ("2", "4", False)
    assert run.data.params["long"] == "x" * 499 + "…" and len(run.data.params) == 154
    assert run.data.metrics == {"acc_1__": 1.0, "up": 2.0, "a/b": 3.0, "n" * 250: 4.0}
    assert run.data.tags["reason_"].endswith("r…") and run.info.status == "FINISHED"


def test_a_refused_record_holds_nothing_up_is_told_and_sent_again(folder):
    tracker = open_tracker(folder)
    tracker.start_run("mine", "mine")
    tracker.register("no/name", "mine", source="/models/a", tags={}, aliases=[])
    tracker.register(MODEL, "never-started", source="/models/a", tags={}, aliases=[])
    tracker.register(MODEL, "mine", source="/models/a", tags={}, aliases=["best"])
    tracker.log_metrics("mine", {"loss": 1.0}, step=3)
    tracker.end_run("mine", "FINISHED")
    assert tracker.close() == 0
    run = runs_of(client_of(folder))["mine"]
    assert (run.data.metrics, run.info.status) == ({"loss": 1.0}, "FINISHED")
    assert client_of(folder).get_model_version_by_alias(MODEL, "best").source == "/models/a"
    (told,) = tracker.delivery.complaints()
    assert "2 records were not taken by the tracker (1 models: Invalid model name 'no/name'" in told
    assert "1 models: its run is not there" in told
    assert f"kept in '{folder}/tracking.refused.jsonl'" in told and "give the same command again" in told

    again = open_tracker(folder)  # the cause of one is gone
    again.start_run("never-started", "late")
    again.end_run("never-started", "FINISHED")
    assert again.close() == 0
    third = open_tracker(folder)
    assert third.close() == 0
    assert [(op, count) for (op, _), count in third.delivery.refused.items()] == [("version", 1)]
    assert {run.info.status for run in runs_of(client_of(folder)).values()} == {"FINISHED"}


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (
            "s3://bucket/runs",
            "files: its artefact store needs the package 'boto3', which is not installed here: pip install",
        ),
        pytest.param("file:///proc/nowhere", "/proc/nowhere", marks=pytest.mark.slow),
        pytest.param("http://127.0.0.1:PORT/artifacts", "wait for the tracker", marks=pytest.mark.slow),
    ],
    ids=["no boto3", "not writable", "never answers"],
)
def test_numbers_pass_an_artefact_store_that_does_not_work(folder, place, said):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        client_of(folder).create_experiment("shoal-mine", place.replace("PORT", str(silent.getsockname()[1])))
        tracker = open_tracker(folder)
        record_search(tracker, folder)
        started = time.monotonic()
        tracker.close(patience_s=6)
        assert time.monotonic() - started < 60
    assert {run.info.status for run in runs_of(client_of(folder)).values()} == {"FINISHED", "FAILED"}
    assert client_of(folder).get_model_version_by_alias(MODEL, "best").source == "/models/a"
    assert said in " ".join(tracker.delivery.complaints())


@pytest.mark.parametrize("meanwhile", [False, True], ids=["before", "meanwhile"])
def test_records_of_a_deleted_experiment_wait_and_are_told(folder, meanwhile):
    client = client_of(folder)
    experiment = client.create_experiment("shoal-mine")
    if not meanwhile:
        client.delete_experiment(experiment)
    tracker = open_tracker(folder)
    tracker.start_run("mine", "mine")
    if meanwhile:
        wait_until(lambda: tracker.num_unsent == 0)
        client.delete_experiment(experiment)
    tracker.log_metrics("mine", {"loss": 1.0})
    tracker.end_run("mine", "FINISHED")
    assert tracker.close(patience_s=1) > 0
    (told,) = tracker.delivery.complaints()
    assert "its experiment 'shoal-mine' was deleted; restore it" in told and not tracker.delivery.refused
    client.restore_experiment(experiment)
    assert open_tracker(folder).close() == 0
    run = runs_of(client)["mine"]
    assert (run.data.metrics, run.info.status) == ({"loss": 1.0}, "FINISHED")


@pytest.mark.slow
def test_a_tracker_that_fails_for_some_records_takes_the_others_and_those_later(folder):
    """Its database refuses metrics, and has lost its registry: errors on its side, not the records' fault."""
    tracker = open_tracker(folder)
    tracker.start_run("mine", "mine")
    wait_until(lambda: tracker.num_unsent == 0)
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        database.execute("CREATE TRIGGER no_room BEFORE INSERT ON metrics BEGIN SELECT RAISE(ABORT, 'no room'); END")
        database.execute("ALTER TABLE registered_models RENAME TO lost")
        database.commit()
        tracker.log_metrics("mine", {"loss": 1.0})
        tracker.register(MODEL, "mine", source="/models/a", tags={}, aliases=["best"])
        tracker.end_run("mine", "FINISHED")
        assert tracker.close(patience_s=30) == 0
        assert {op for op, _ in tracker.delivery.refused} == {"metrics", "version"}
        run = runs_of(client_of(folder))["mine"]
        assert (run.data.metrics, run.info.status) == ({}, "FINISHED")
        database.execute("DROP TRIGGER no_room")
        database.execute("ALTER TABLE lost RENAME TO registered_models")
        database.commit()
    again = open_tracker(folder)
    assert again.close() == 0 and not again.delivery.complaints()
    run = runs_of(client_of(folder))["mine"]
    assert (run.data.metrics, run.info.status) == ({"loss": 1.0}, "FINISHED")
    assert client_of(folder).get_model_version_by_alias(MODEL, "best").source == "/models/a"


def test_a_run_that_somebody_deletes_is_made_anew_for_what_comes(folder):
    client, tracker = client_of(folder), open_tracker(folder)
    tracker.start_run("mine", "mine")
    wait_until(lambda: tracker.num_unsent == 0)
    client.delete_run(runs_of(client)["mine"].info.run_id)
    tracker.log_metrics("mine", {"loss": 1.0})
    tracker.end_run("mine", "FINISHED")
    assert tracker.close() == 0 and not tracker.delivery.complaints()
    assert runs_of(client)["mine"].data.metrics == {"loss": 1.0}


@pytest.mark.parametrize(
    ("go_wrong", "status", "reason"),
    [
        (lambda: [][0], "FAILED", "IndexError: list index out of range"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(5), "KILLED", None),
        (lambda: sys.exit(3), "KILLED", None),
    ],
    ids=["an error", "SIGTERM", "exit"],
)
def test_nothing_is_left_running_whatever_goes_wrong(folder, go_wrong, status, reason):
    from dummy_trials import DummyEvents, DummyFolder, DummySweep

    tracker = open_tracker(folder)
    events = DummyEvents(DummySweep(folder, 1, 1, 0.0), DummyFolder(folder), tracker, on_end=lambda _: None)
    with pytest.raises(BaseException) as caught, events.running():
        tracker.start_run(events.run_key("a"), "a", parent=events.parent)
        go_wrong()
    assert isinstance(caught.value, (IndexError, KeyboardInterrupt, SystemExit))
    runs = runs_of(client_of(folder))
    parent = runs.pop(events.parent)
    assert (parent.info.status, parent.data.tags.get("last_error")) == (status, reason)
    assert [run.info.status for run in runs.values()] == ["KILLED"]


def test_a_damaged_line_is_passed_over(folder):
    tracker = open_tracker(folder, f"http://127.0.0.1:{free_port()}")
    record_search(tracker, folder)
    tracker.close(patience_s=0)
    file = folder / "tracking.jsonl"
    first, rest = file.read_text().split("\n", 1)
    file.write_text(f'{first}\n{{"op": "met\n{rest}[]\n')
    tracker = open_tracker(folder)
    assert tracker.close() == 0
    assert_search_is_there(client_of(folder))


def test_a_folder_of_the_same_path_has_other_runs(folder):
    """The search was deleted, and another one has its name: or it is on another machine."""
    identities = set()
    for _ in range(2):
        identities |= {open_tracker(folder).identity, open_tracker(folder).identity}
        for file in folder.glob("tracking.*"):
            file.unlink()
    assert len(identities) == 2


def test_numbers_that_are_none_arrive(folder):
    """A loss that ran away is news, and must not hold up the others."""
    tracker = open_tracker(folder)
    tracker.start_run("mine", "mine")
    for step, value in enumerate((float("nan"), float("inf"), -float("inf"), 1.0)):
        tracker.log_metrics("mine", {"loss": value}, step=step)
    assert tracker.close() == 0
    run = runs_of(client_of(folder))["mine"]
    assert len(client_of(folder).get_metric_history(run.info.run_id, "loss")) == 4


def test_a_file_that_is_gone_is_passed_over(folder):
    tracker = open_tracker(folder)
    tracker.start_run("mine", "mine")
    tracker.log_artifact("mine", folder / "never-written.json")
    tracker.end_run("mine", "FINISHED")
    assert tracker.close() == 0
    assert runs_of(client_of(folder))["mine"].info.status == "FINISHED"


def test_nobody_listens_where_ping_asks():
    with pytest.raises((RuntimeError, OSError)):
        ping(f"http://127.0.0.1:{free_port()}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server, one worker, on a free port of this machine."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"})
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log.txt")
        yield f"http://127.0.0.1:{port}"
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for member in alive:
            member.kill()


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_a_server_gets_what_sqlite_gets(server, tmp_path):
    """Records that were kept while no server answered, sent twice: over HTTP as into the file."""
    down = open_tracker(tmp_path, f"http://127.0.0.1:{free_port()}")
    record_search(down, tmp_path)
    assert down.close(patience_s=0) > 0
    for _ in range(2):
        tracker = open_tracker(tmp_path, server)
        assert tracker.close() == 0
        for file in tmp_path.glob("tracking.*.position"):
            file.unlink()
    assert not (tmp_path / "tracking.refused.jsonl").exists()
    assert_search_is_there(mlflow.MlflowClient(server))
    assert ping(server) == f"{server}: 2 experiments"


@pytest.mark.slow
def test_a_server_takes_a_changed_param_as_sqlite_does(server, tmp_path):
    tracker = open_tracker(tmp_path, server)
    tracker.start_run("changed", "changed", params={"model": "tiny"})
    tracker.start_run("changed", "changed", params={"model": "another"})
    tracker.end_run("changed", "FINISHED")
    assert tracker.close() == 0
    run = runs_of(mlflow.MlflowClient(server))["changed"]
    assert (run.data.params["model"], run.data.tags["model"], run.info.status) == ("tiny", "another", "FINISHED")


@pytest.mark.slow
def test_a_server_takes_a_folder_that_no_search_registered(server, tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    save_file({"weight": tensor([1.0])}, place / "model.safetensors")
    for _ in range(2):
        done = promote(str(place), "served@live", server)
        assert (done.now.version, done.now.tags[HASH_TAG], done.is_checked) == ("1", hash_folder(place), False)
    assert find_registered("models:/served@live", server) == str(place)
