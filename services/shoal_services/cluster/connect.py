"""Connecting to Ray: the cluster that this machine is part of, or a local one."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import ray

CONNECT_TIMEOUT_S = 10
LEAVE_IT_OUT = "check the address, or leave it out to run here"
# Train waits this long between looks at its workers, and a report takes as long: 2 s by default.
WORKER_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# On one machine nobody gives notice of preemption: each trial is spared the process that would listen for it.
LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def connect(address: str | None, *, num_cpus: int | None = None) -> None:
    """Connects to the cluster at `address`, or starts a local one; does nothing if connected.

    Raises ConnectionError if no cluster answers there.
    """
    if ray.is_initialized():
        return
    require_listener(address, LEAVE_IT_OUT)
    with _keep_signals():
        _init(address, num_cpus)


def _init(address: str | None, num_cpus: int | None) -> None:
    environment = {name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()}
    try:
        if address:
            ray.init(address, runtime_env={"env_vars": environment}, log_to_driver=False, logging_level=logging.ERROR)
        else:
            # A local cluster inherits the environment: without a runtime_env, workers start from Ray's warm pool.
            os.environ.update(LOCAL_ENVIRONMENT | environment)
            ray.init(
                "local", num_cpus=num_cpus or os.cpu_count(), log_to_driver=False, logging_level=logging.ERROR,
                _system_config={"worker_maximum_startup_concurrency": 16},
            )  # fmt: skip
    except Exception as error:  # Ray raises nothing narrower where a node does not start in time
        first = (str(error).splitlines() or [""])[0]
        if address is None:
            raise ConnectionError(
                f"Ray did not start here: {first}; give the command again when this machine is less busy"
            ) from error
        raise ConnectionError(f"no Ray cluster at {address!r}: {first}; {LEAVE_IT_OUT}") from error


@contextmanager
def _keep_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and a run that is measuring would end in the stacks of its C++ threads."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def require_listener(address: str | None, advice: str) -> None:
    """Raises ConnectionError if nobody listens at an address with host and port: Ray itself would try for minutes."""
    given = address or ""
    url = urlsplit(given if "://" in given else f"//{given}")
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    if url.hostname and port:
        try:
            socket.create_connection((url.hostname, port), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ConnectionError(f"no Ray cluster at {address!r}: {error.strerror or error}; {advice}") from error
