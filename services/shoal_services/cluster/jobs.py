"""Jobs of a cluster, through Ray's Jobs API: connect, list, follow the log, stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from shoal_services.cluster.connect import require_listener
from shoal_services.complaints import suggest

RECONNECT_S = 2.0
PATIENCE_S = 60.0
SILENCE_S = 60.0
INTERRUPTED = 130
NAME_TAG, FOLDER_TAG = "shoal.name", "shoal.folder"


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


def list_jobs(client: JobSubmissionClient) -> list[Job]:
    """All submitted searches that the cluster remembers, the oldest first."""
    jobs = [Job.of(details) for details in list_details(client) if NAME_TAG in (details.metadata or {})]
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
    async with contextlib.aclosing(cast(AsyncGenerator[str, None], client.tail_job_logs(job_id))) as stream:
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
            f"the cluster at {address} takes requests with its token alone; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
            f"RAY_AUTH_TOKEN_PATH, a file) to the cluster's token ({_first_line(error)})"
        ) from error


def list_details(client: JobSubmissionClient) -> list[JobDetails]:
    """All jobs that were submitted, other people's included, as Ray describes them."""
    return [details for details in client.list_jobs() if details.submission_id]


def _read_time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
