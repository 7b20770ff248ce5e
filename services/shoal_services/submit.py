"""A search sent to a cluster through Ray's Jobs API: it runs on the head node, and the machine that sent it may leave.

The cluster needs Shoal installed (in its image); what travels is the search's file and its small texts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from shoal.recipe import TEXT_SUFFIXES, fingerprint

from shoal_services.cluster import require_listener
from shoal_services.complaints import suggest
from shoal_services.config import SearchConfig

MAX_TEXT_BYTES = 16 * 2**20
RECONNECT_S = 2.0
PATIENCE_S = 60.0
SILENCE_S = 60.0
INTERRUPTED = 130
# Stopped like Ctrl-C: trials end, and their MLflow runs with them. Ray kills what is left after the wait.
JOB_ENVIRONMENT = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60", "COLUMNS": "120"}
NAME_TAG, SEARCH_TAG, CONFIG_TAG, FOLDER_TAG = "shoal.name", "shoal.search", "shoal.config_sha256", "shoal.folder"


@dataclass(frozen=True)
class Job:
    """One submission of a search; times in UTC."""

    id: str
    name: str
    folder: str
    status: str
    message: str
    started: datetime | None
    ended: datetime | None
    exit_code: int | None

    @classmethod
    def of(cls, details: JobDetails) -> Job:
        tags = details.metadata or {}
        return cls(
            id=details.submission_id or "", name=tags.get(NAME_TAG, ""), folder=tags.get(FOLDER_TAG, ""),
            status=details.status.value, message=details.message or "", started=_read_time(details.start_time),
            ended=_read_time(details.end_time), exit_code=details.driver_exit_code,
        )  # fmt: skip

    @property
    def has_ended(self) -> bool:
        return JobStatus(self.status).is_terminal()

    @property
    def outcome(self) -> int:
        """The exit code that stands for how the job ended."""
        if self.status == JobStatus.SUCCEEDED.value:
            return 0
        return INTERRUPTED if self.status == JobStatus.STOPPED.value else self.exit_code or 1


def connect_jobs(address: str) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at `address`.

    Raises ConnectionError if none answers, PermissionError if it wants a token that is not here.
    """
    advice = "give the address of the head's dashboard, such as http://HEAD:8265"
    require_listener(address, advice)
    for name in ("job.sdk", "dashboard_sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.ERROR)
    with _explain_refusal(address), _address_in_force(address):
        try:
            return JobSubmissionClient(address)
        except (ConnectionError, ValueError) as error:
            raise ConnectionError(f"no Ray cluster at {address!r}: {_first_line(error)}; {advice}") from error


def submit_search(client: JobSubmissionClient, file: Path, config: SearchConfig) -> str:
    """Sends the search of `file` (`config` is what it says, with the command's changes); returns the job's id.

    Raises ValueError for what would not run there, and for a search that is running already.
    """
    texts = require_portable(config)
    key = f"{config.name}-{fingerprint(str(config.run.storage / config.name))[:8]}"
    earlier = [details for details in _list_details(client) if (details.metadata or {}).get(SEARCH_TAG) == key]
    for details in earlier:
        if not details.status.is_terminal():
            raise ValueError(_explain_running(config, details.submission_id or ""))
    job_id = f"{key}-{len(earlier) + 1}"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(file, Path(folder) / file.name)
        for text in texts:
            (Path(folder) / text.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy(text, Path(folder) / text)
        try:
            return client.submit_job(
                entrypoint=_write_entrypoint(file.name, config),
                submission_id=job_id,
                runtime_env={"working_dir": folder, "env_vars": JOB_ENVIRONMENT},
                metadata={
                    NAME_TAG: config.name, SEARCH_TAG: key, FOLDER_TAG: str(config.run.storage / config.name),
                    CONFIG_TAG: hashlib.sha256(file.read_bytes()).hexdigest(),
                },
            )  # fmt: skip
        except RuntimeError as error:
            if "already exists" in str(error):  # somebody was faster by a second
                raise ValueError(_explain_running(config, job_id)) from error
            if "No available agent" in str(error):
                raise ConnectionError(
                    "the cluster's head runs no agent that takes jobs yet; try again in a minute, and if that does not "
                    "help, look whether its port 52365 (--dashboard-agent-listen-port) is taken"
                ) from error
            raise


def list_jobs(client: JobSubmissionClient) -> list[Job]:
    """All submitted searches that the cluster remembers, the oldest first."""
    jobs = [Job.of(details) for details in _list_details(client) if NAME_TAG in (details.metadata or {})]
    return sorted(jobs, key=lambda job: job.started or datetime.max.replace(tzinfo=UTC))


def find_job(client: JobSubmissionClient, name: str) -> Job:
    """The job of this id, or the newest of the search of this name. Raises ValueError if there is none."""
    jobs = list_jobs(client)
    found = [job for job in jobs if job.id == name] or [job for job in jobs if job.name == name]
    if not found:
        raise ValueError(f"no job {name!r} on this cluster{suggest(name, [job.id for job in jobs])}; see `shoal jobs`")
    return found[-1]


def follow_log(client: JobSubmissionClient, job_id: str, write: Callable[[str], object]) -> Job:
    """Writes a job's log from its beginning until the job ends; returns how it ended.

    A connection that breaks is made again, and the log goes on where it was. Raises ConnectionError if that takes
    longer than a minute; KeyboardInterrupt leaves the job running.
    """
    asyncio.run(_follow(client, job_id, write))
    return Job.of(client.get_job_info(job_id))


def stop_job(client: JobSubmissionClient, job_id: str, *, patience_s: float = 90.0) -> Job:
    """Asks a job to stop, waits until it has, and returns how it ended. Raises TimeoutError if it does not stop."""
    client.stop_job(job_id)
    deadline = time.monotonic() + patience_s
    while not (job := Job.of(client.get_job_info(job_id))).has_ended:
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job_id} was asked to stop and has not yet; look again with `shoal jobs`")
        time.sleep(0.5)
    return job


def require_portable(config: SearchConfig) -> list[Path]:
    """The text files that travel with a search.

    Raises ValueError for paths that mean this machine alone, and for passwords that the job's page would show.
    """
    storage = config.run.storage
    if not storage.is_absolute():
        raise ValueError(
            f"run.storage {str(storage)!r} is relative, and a cluster has no folder of yours to begin from; give the "
            "absolute path of a folder that all its nodes share (NFS, a mounted bucket): --storage /mnt/shared/shoal-runs"
        )
    model = Path(config.model)
    if not model.is_absolute() and (model.exists() or config.model.startswith(".")):
        raise ValueError(
            f"model {config.model!r} is a folder or file of this machine; put it where all nodes of the cluster see it and "
            "give its absolute path, or give a Hub id"
        )
    if urlsplit(config.run.tracking_uri or "").password:
        raise ValueError(
            "run.tracking_uri holds a password, which everyone who sees the job would read; "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster"
        )
    return _list_relative_texts(config)


def _list_relative_texts(config: SearchConfig) -> list[Path]:
    """Raises ValueError for those that are not here, not below this folder, or too large."""
    named = {Path(source) for source in (*config.texts.train, *config.texts.evaluation)}
    texts = sorted(path for path in named if path.suffix in TEXT_SUFFIXES and not path.is_absolute())
    for path in texts:
        if not path.is_file():
            raise ValueError(f"text file {str(path)!r} does not exist; check the path")
        if ".." in path.parts:
            raise ValueError(
                f"text {str(path)!r} lies outside this folder; put it below, or on storage that all nodes share"
            )
    size = sum(path.stat().st_size for path in texts)
    if size > MAX_TEXT_BYTES:
        raise ValueError(
            f"the search's text files {', '.join(map(repr, map(str, texts)))} have {size / 2**20:.0f} MiB, and a job "
            f"carries {MAX_TEXT_BYTES >> 20} MiB at most; put them on storage that all nodes share and give absolute paths"
        )
    return texts


def _write_entrypoint(file_name: str, config: SearchConfig) -> str:
    """The command that runs on the head."""
    words = ["shoal", "search", file_name, "--address", "auto", "--storage", str(config.run.storage)]
    if config.run.tracking_uri:
        words += ["--tracking-uri", config.run.tracking_uri]
    return shlex.join(words)


def _explain_running(config: SearchConfig, job_id: str) -> str:
    return (
        f"the search {config.name!r} in {str(config.run.storage)!r} is running as job {job_id}; follow it with "
        f"`shoal logs {job_id} --follow`, or stop it with `shoal stop {job_id}` and submit again: it goes on where it was"
    )


async def _follow(client: JobSubmissionClient, job_id: str, write: Callable[[str], object]) -> None:
    log, heard_at = _Log(write), time.monotonic()
    while True:
        try:
            ended = await _read_log(client, job_id, log)
            if client.get_job_status(job_id).is_terminal() and ended:
                return
            heard_at = time.monotonic()
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            if time.monotonic() - heard_at > PATIENCE_S:
                raise ConnectionError(
                    f"the cluster has not answered for {PATIENCE_S:.0f} s ({_first_line(error)}); job {job_id} may "
                    f"be running on: come back with `shoal logs {job_id} --follow`"
                ) from error
        await asyncio.sleep(RECONNECT_S)


async def _read_log(client: JobSubmissionClient, job_id: str, log: _Log) -> bool:
    """Reads until the log's end (True), or until nothing has come for a while: a dead connection is silent too."""
    log.begin()
    async with contextlib.aclosing(client.tail_job_logs(job_id)) as stream:
        while True:
            try:
                log.add(await asyncio.wait_for(anext(stream), SILENCE_S))
            except StopAsyncIteration:
                return True
            except TimeoutError:
                return False


class _Log:
    """A log that always comes from its beginning: what was written before the connection broke is passed over."""

    def __init__(self, write: Callable[[str], object]):
        self.write, self.num_written, self.position = write, 0, 0

    def begin(self) -> None:
        self.position = 0

    def add(self, text: str) -> None:
        if fresh := text[max(0, self.num_written - self.position) :]:
            self.write(fresh)
        self.position += len(text)
        self.num_written = max(self.num_written, self.position)


@contextmanager
def _address_in_force(address: str) -> Iterator[None]:
    """Inside, an address that was given wins: Ray's client lets its environment variables win."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def _explain_refusal(address: str) -> Iterator[None]:
    """Ray's word about tokens, as an error that says what to set."""
    try:
        yield
    except AuthenticationError as error:
        raise PermissionError(
            f"the cluster at {address} takes requests with its token alone: {_first_line(error)}; set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, a file) to the cluster's token"
        ) from error


def _list_details(client: JobSubmissionClient) -> list[JobDetails]:
    return [details for details in client.list_jobs() if details.submission_id]


def _read_time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
