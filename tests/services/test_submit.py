"""Searches as jobs: what may travel, and what the commands say of jobs that run, end and are stopped."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import yaml
from ray.job_submission import JobSubmissionClient
from shoal_services.cli import main
from shoal_services.cluster.jobs import FOLDER_TAG, NAME_TAG, connect_jobs, follow_log
from shoal_services.search.config import SearchConfig, load_config
from shoal_services.search.portable import MAX_TEXT_BYTES, find_secrets, require_portable

SHOAL = Path(sys.executable).with_name("shoal")


@pytest.fixture
def shoal(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Runs `shoal` with these words in an empty folder; its exit code, output and errors."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(sys, "argv", ["shoal", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def smoke(root) -> SearchConfig:
    return load_config(root / "tune_configs" / "smoke.yaml").run_with(storage=Path("/mnt/shared"))


def check(config: SearchConfig, text: str | None = None) -> list[Path]:
    """The text files that would travel with the search that a file says."""
    return require_portable(config, text or yaml.safe_dump(config.model_dump(mode="json", exclude={"run"})))


def with_texts(config: SearchConfig, *train: str) -> SearchConfig:
    return config.model_copy(update={"texts": config.texts.model_copy(update={"train": train})})


def test_small_texts_of_this_folder_travel(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("a.txt", "data/b.jsonl"):
        (tmp_path / name).write_text("x" * 1000)
    config = with_texts(smoke, "a.txt", "data/b.jsonl", "/mnt/shared/c.parquet", "Salesforce/wikitext:w@train", "a.txt")
    assert check(config) == [Path("a.txt"), Path("data/b.jsonl")]
    assert check(smoke) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"storage": Path("shoal-runs")}, "run.storage 'shoal-runs' is relative"),
        ({"storage": Path("~/runs")}, "--storage /mnt/shared/shoal-runs"),
        ({"tracking_uri": "https://me:secret@mlflow"}, "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ({"tracking_uri": "sqlite:///runs.db"}, "'sqlite:///runs.db' is a file of this machine"),
    ],
)
def test_what_means_this_machine_alone_does_not_travel(smoke, changes, said):
    with pytest.raises(ValueError) as caught:
        check(smoke.run_with(**changes))
    assert said in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("run: {tracking_uri: 'https://me:secret@mlflow.team:5000/x'}", "https://***@mlflow.team:5000"),
        ("# was postgresql://mlflow:secret@db/mlflow", "postgresql://***@db"),
        ("texts: {train: 'https://host/a.jsonl?X-Amz-Signature=secret&b=1'}", "?X-Amz-Signature=***"),
        ("texts: {train: 'https://host/a.jsonl?sv=1&sig=secret'}", "&sig=***"),
        ("# HF_TOKEN=hf_secretsecretsecretsecret", "***"),
        ("run: {tracking_uri: 'https://secret@mlflow'}", "https://***@mlflow"),
    ],
)
def test_passwords_do_not_travel_wherever_they_stand(smoke, line, shown):
    with pytest.raises(ValueError) as caught:
        check(smoke, f"model: tiny-random\n{line}\n")
    assert f"the search's file holds a password or token ({shown})" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_what_is_no_password_travels(root):
    for file in (root / "tune_configs").glob("*.yaml"):
        assert find_secrets(file.read_text()) == []
    for text in (
        "http://mlflow:5000",
        "models:/shoal-x@best",
        "hf://org/name@main",
        "postgresql://u:$(PASSWORD)@db",
        "a@b.org",
    ):
        assert find_secrets(text) == []


def test_texts_and_models_that_do_not_travel(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big.txt").touch()
    os.truncate("big.txt", MAX_TEXT_BYTES + 1)
    (tmp_path / "below").mkdir()
    (tmp_path / "mine").mkdir()
    for text, said in (
        ("big.txt", r"'big.txt' have 16 MiB, and a job carries 16 MiB at most; put them on storage that all nodes share"),
        ("absent.txt", r"'absent.txt' does not exist"),
        ("below/../big.txt", r"lies outside this folder"),
    ):
        with pytest.raises(ValueError, match=said):
            check(with_texts(smoke, text))
    with pytest.raises(ValueError, match=r"model 'mine' is a folder or file of this machine"):
        check(smoke.model_copy(update={"model": "mine"}))
    (tmp_path / "task.jsonl").touch()
    with pytest.raises(ValueError, match=r"tasks 'task.jsonl' is a folder or file of this machine"):
        check(smoke, "model: tiny-random\ntasks: {names: [arc_easy, task.jsonl]}")


def test_a_file_is_checked_before_anybody_is_asked(shoal, root, tmp_path):
    data = yaml.safe_load((root / "tune_configs" / "smoke.yaml").read_text())
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**data, "serch": {}}))
    code, _, said = shoal("submit", "wrong.yaml", "--address", "http://127.0.0.1:1")
    assert code == 1 and "unknown key 'serch' in wrong.yaml; did you mean 'search'?" in said
    code, _, said = shoal("submit", root / "tune_configs" / "smoke.yaml", "--address", "http://127.0.0.1:1")
    assert code == 1 and "run.storage 'shoal-runs' is relative" in said


@pytest.mark.parametrize("command", [["jobs"], ["logs", "x"], ["stop", "x"]])
def test_a_cluster_that_does_not_answer_is_told_at_once(shoal, command):
    started = time.monotonic()
    code, _, said = shoal(*command, "--address", "http://127.0.0.1:1")
    assert code == 1 and time.monotonic() - started < 10
    assert "no Ray cluster at 'http://127.0.0.1:1': Connection refused; give the address of the head's dashboard" in said


@pytest.fixture(scope="module")
def dashboard(ray_cluster) -> str:
    """The address at which the shared Ray takes jobs."""
    address = f"http://{ray._private.worker.global_worker.node.address_info['webui_url']}"
    client = JobSubmissionClient(address)
    try:
        client.submit_job(entrypoint="true")
    except RuntimeError as error:
        if "No available agent" in str(error):
            pytest.skip("another Ray on this machine holds port 52365, by which jobs are taken")
        raise
    return address


@pytest.fixture
def start_job(dashboard) -> Iterator[Callable[[str], str]]:
    """Submits a shell command as if it were a search named by the test; returns its id."""
    client, started = JobSubmissionClient(dashboard), []

    def start(command: str, name: str | None = None) -> str:
        tags = {NAME_TAG: name or f"test-{uuid.uuid4().hex[:6]}", FOLDER_TAG: "/mnt/shared/runs/it"}
        started.append(client.submit_job(entrypoint=command, metadata=tags))
        return started[-1]

    yield start
    for job in started:
        client.stop_job(job)


def test_a_job_is_listed_read_and_stopped(shoal, dashboard, start_job, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", dashboard)
    job = start_job("echo hello; sleep 60", name="nightly")
    deadline = time.monotonic() + 60
    while "hello" not in (said := shoal("logs", "nightly"))[1]:
        assert time.monotonic() < deadline, said
    (listed,) = [entry for entry in json.loads(shoal("jobs", "--json")[1]) if entry["id"] == job]
    assert (listed["name"], listed["status"], listed["folder"]) == ("nightly", "RUNNING", "/mnt/shared/runs/it")
    code, _, said = shoal("stop", "nightly")
    assert code == 0 and f"job {job}: STOPPED; `shoal submit` goes on from here" in said
    assert "has ended already: STOPPED" in shoal("stop", job)[2]
    assert shoal("logs", job, "--follow")[0] == 130
    assert job in shoal("jobs")[1]
    # An address that is given beats the environment's.
    assert "no Ray cluster at 'http://127.0.0.1:1'" in shoal("jobs", "--address", "http://127.0.0.1:1")[2]


def test_a_followed_job_gives_its_exit_code(shoal, dashboard, start_job):
    job = start_job("echo first; sleep 1; echo last; exit 3")
    code, log, said = shoal("logs", job, "--follow", "--address", dashboard)
    assert code == 3
    assert [line for line in log.splitlines() if line in ("first", "last")] == ["first", "last"]
    assert f"job {job}: FAILED, results in /mnt/shared/runs/it" in said
    code, _, said = shoal("logs", job[:-1], "--address", dashboard)
    assert code == 1 and f"no job {job[:-1]!r} on this cluster; did you mean {job!r}?" in said


class Cable:
    """A TCP connection through this process to the dashboard that is cut `num_cuts` times, each after a log line."""

    def __init__(self, target: str, num_cuts: int):
        self.host, port = target.removeprefix("http://").split(":")
        self.port, self.num_cuts = int(port), num_cuts
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self.listener.accept()
            far = socket.create_connection((self.host, self.port))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65536):
            sink.sendall(data)
            if b"line " in data and self.num_cuts:
                self.num_cuts -= 1
                break
        for end in (source, sink):
            with contextlib.suppress(OSError):  # the other direction was quicker
                end.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
def test_a_log_goes_on_after_the_connection_breaks(dashboard, start_job):
    job = start_job("for i in 1 2 3 4; do echo line $i; sleep 1; done")
    cable = Cable(dashboard, num_cuts=2)
    heard: list[str] = []
    ended = follow_log(connect_jobs(cable.address), job, heard.append)
    assert cable.num_cuts == 0
    assert ended.status == "SUCCEEDED" and ended.outcome == 0
    lines = [line for line in "".join(heard).splitlines() if line.startswith("line ")]
    assert lines == ["line 1", "line 2", "line 3", "line 4"]


@pytest.mark.slow
def test_a_search_that_runs_is_not_submitted_twice(shoal, dashboard, root, tmp_path):
    """A real submission; the job is refused by its own checks, because the storage is a file."""
    (tmp_path / "file").touch()
    words = ["submit", root / "tune_configs" / "smoke.yaml", "--address", dashboard, "--storage", tmp_path / "file"]
    code, _, said = shoal(*words, "--detach")
    assert code == 0
    job = said.split()[1]
    assert job.startswith("smoke-") and job.endswith("-1") and f"shoal logs {job} --follow" in said
    code, _, said = shoal(*words)
    assert code == 1 and f"is running as job {job}" in said and f"shoal stop {job}" in said
    code, log, said = shoal("logs", "smoke", "--follow", "--address", dashboard)
    assert code == 1, log
    assert f"storage '{tmp_path}/file/smoke': '{tmp_path}/file' is a file; choose another run.storage" in " ".join(
        log.split()
    )
    code, _, said = shoal(*words, "--detach")
    assert code == 0 and said.split()[1] == f"{job[:-1]}2"
    assert shoal("stop", "smoke", "--address", dashboard)[0] == 0


@pytest.mark.parametrize("mode", [{}, {"RAY_AUTH_MODE": "token"}], ids=["no mode", "no token"])
def test_without_the_token_the_cluster_is_closed(dashboard, tmp_path, mode):
    """In a process of its own: Ray reads tokens once."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [str(SHOAL), "jobs", "--address", dashboard]
    ended = subprocess.run(
        command, env=unset | mode | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1, ended.stdout
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, a file)" in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
