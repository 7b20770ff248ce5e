"""`shoal submit`, `shoal jobs`, `shoal logs` and `shoal stop`: searches on a cluster, through Ray's Jobs API."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal_services.commands.options import AsJson

if TYPE_CHECKING:
    from shoal_services.cluster.jobs import Job

Address = Annotated[
    str,
    typer.Option(
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"], help="The cluster: the dashboard of its head, http://HEAD:8265."
    ),
]
JobName = Annotated[str, typer.Argument(help="A job's id, or a search's name for its newest job.", metavar="ID")]
LOCAL_DASHBOARD = "http://127.0.0.1:8265"


def submit(
    config: Annotated[Path, typer.Argument(help="A search: a YAML file as in tune_configs/.")],
    address: Address = LOCAL_DASHBOARD,
    storage: Annotated[
        Path | None, typer.Option(help="Folder that all nodes share, instead of run.storage; absolute.")
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server, instead of SQLite in the search's folder.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once the job is there; do not follow its log.")] = False,
) -> None:
    """Run a search on a cluster as a job of its own, and follow its log.

    The file is checked here first. The job lives on the cluster: Ctrl-C or a closed laptop leaves it running. Ended or
    stopped, it goes on where it was when submitted again. The exit code is the job's.

    Examples:

        shoal submit my.yaml --address http://head:8265 --storage /mnt/shared/shoal-runs

        shoal submit my.yaml --address http://head:8265 --detach
    """
    from shoal_services.search.config import load_config

    loaded = load_config(config).run_with(storage=storage, tracking_uri=tracking_uri)

    from shoal_services.cluster.jobs import connect_jobs
    from shoal_services.console import say
    from shoal_services.search.portable import require_portable
    from shoal_services.search.submit import submit_search

    require_portable(loaded, config.read_text(encoding="utf-8"))
    client = connect_jobs(address)
    job_id = submit_search(client, config, loaded)
    say(f"job {job_id} on {address}")
    if detach:
        say(_say_how_to_return(job_id, address))
        return
    _follow(client, job_id, address)


def jobs(address: Address = LOCAL_DASHBOARD, as_json: AsJson = False) -> None:
    """List the searches that were submitted to a cluster.

    Examples:

        shoal jobs --address http://head:8265

        shoal jobs --json
    """
    from shoal_services.cluster.jobs import connect_jobs, list_jobs

    found = list_jobs(connect_jobs(address))
    if as_json:
        print(json.dumps([dataclasses.asdict(job) for job in found], indent=2, default=str))
    else:
        _print_table(found)


def logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    address: Address = LOCAL_DASHBOARD,
) -> None:
    """Print the log of a submitted search; with --follow until it ends, with the job's exit code.

    Examples:

        shoal logs demo --address http://head:8265

        shoal logs demo-1a2b3c4d-1 --follow
    """
    from shoal_services.cluster.jobs import connect_jobs, find_job

    client = connect_jobs(address)
    found = find_job(client, job)
    if follow:
        _follow(client, found.id, address)
    else:
        sys.stdout.write(client.get_job_logs(found.id))


def stop(job: JobName, address: Address = LOCAL_DASHBOARD) -> None:
    """Stop a submitted search cleanly; submitted again, it goes on where it stopped.

    Examples:

        shoal stop demo --address http://head:8265

        shoal stop demo-1a2b3c4d-1
    """
    from shoal_services.cluster.jobs import connect_jobs, find_job, stop_job
    from shoal_services.console import say

    client = connect_jobs(address)
    found = find_job(client, job)
    if found.has_ended:
        say(f"job {found.id} has ended already: {found.status}")
        return
    say(f"job {found.id}: {stop_job(client, found.id).status}; `shoal submit` goes on from here")


def _follow(client, job_id: str, address: str) -> None:
    """The log to standard output, and the job's outcome as exit code."""
    from shoal_services.cluster.jobs import INTERRUPTED, follow_log
    from shoal_services.console import say

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        ended = follow_log(client, job_id, write)
    except KeyboardInterrupt as interrupt:
        say(f"\njob {job_id} runs on\n{_say_how_to_return(job_id, address)}")
        raise typer.Exit(INTERRUPTED) from interrupt
    say(f"job {job_id}: {ended.status}, results in {ended.folder}")
    if ended.exit_code == 127:
        say("the cluster does not know the command `shoal`: install Shoal on its head and nodes, in one version")
    elif ended.outcome and not ended.exit_code:
        say(ended.message.splitlines()[0] if ended.message else "")
    raise typer.Exit(ended.outcome)


def _print_table(found: list[Job]) -> None:
    """Submitted searches with state, start (UTC), length and folder."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from shoal_services.console import show

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("job", "status", "started, UTC", "took", "folder"):
        table.add_column(column, no_wrap=column != "folder", overflow="fold")
    for job in found:
        started = f"{job.started:%Y-%m-%d %H:%M}" if job.started else ""
        took = str((job.ended or datetime.now(UTC)) - job.started).partition(".")[0] if job.started else ""
        table.add_row(job.id, job.status, started, took, job.folder)
    show(table)


def _say_how_to_return(job_id: str, address: str) -> str:
    from shoal_services.console import mask_passwords, quote

    options = "--address", mask_passwords(address)
    follow, stop = quote("shoal", "logs", job_id, "--follow", *options), quote("shoal", "stop", job_id, *options)
    return f"follow:  {follow}\nstop:    {stop}"
