"""A search sent to a cluster as a job: it runs on the head node, and the machine that sent it may leave.

The cluster needs Shoal installed (in its image); what travels is the search's file and its small texts.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import tempfile
from pathlib import Path

from ray.job_submission import JobSubmissionClient
from shoal.value import fingerprint

from shoal_services.cluster.jobs import FOLDER_TAG, NAME_TAG, list_details
from shoal_services.search.config import SearchConfig
from shoal_services.search.portable import require_portable

SEARCH_TAG, CONFIG_TAG = "shoal.search", "shoal.config_sha256"
# Stopped like Ctrl-C: trials end, and their MLflow runs with them. Ray kills what is left after the wait.
JOB_ENVIRONMENT = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60", "COLUMNS": "120"}


def submit_search(client: JobSubmissionClient, file: Path, config: SearchConfig) -> str:
    """Sends the search of `file` (`config` is what it says, with the command's changes); returns the job's id.

    Raises ValueError for what would not run there, and for a search that is running already.
    """
    texts = require_portable(config, file.read_text(encoding="utf-8"))
    key = f"{config.name}-{fingerprint(str(config.run.storage / config.name))[:8]}"
    earlier = [details for details in list_details(client) if (details.metadata or {}).get(SEARCH_TAG) == key]
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
