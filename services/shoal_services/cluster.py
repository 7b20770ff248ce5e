"""Connecting to Ray, and the checks before a search: resources, storage, versions. Each failure names a remedy."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import socket
import uuid
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import ray
from shoal.files import write_text

from shoal_services.config import Run

MIN_FREE_BYTES = 2 * 2**30
CONNECT_TIMEOUT_S = 10
LEAVE_IT_OUT = "check the address, or leave it out to run here"
VERSIONED = ("ray", "torch", "transformers", "shoal")
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
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ConnectionError(f"no Ray cluster at {address!r}: {first}; {LEAVE_IT_OUT}") from error


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


def check_cluster(run: Run, storage: Path) -> int:
    """How many trials fit at once.

    Raises ValueError for resources that the cluster does not have, storage that is not writable from every node or
    nearly full, and package versions that differ between nodes.
    """
    check_writable(storage)
    concurrent = count_concurrent_trials(run)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1:
        _check_nodes(nodes, storage)
    return concurrent


def count_concurrent_trials(run: Run) -> int:
    """Trials that the cluster's CPUs and GPUs hold at once, at most `max_concurrent_trials`."""
    total = ray.cluster_resources()
    counts = []
    for resource, per_worker in (("CPU", run.cpus_per_worker), ("GPU", run.gpus_per_worker)):
        needed = per_worker * run.num_workers
        if needed and needed > total.get(resource, 0):
            raise ValueError(
                f"a trial needs {needed:g} {resource}s ({run.num_workers} workers of {per_worker:g}), and the cluster has "
                f"{total.get(resource, 0):g}; lower run.num_workers or run.{resource.lower()}s_per_worker, or add nodes"
            )
        if needed:
            counts.append(int(total[resource] // needed))
    return min([*counts, run.max_concurrent_trials or counts[0]])


def check_writable(storage: Path) -> None:
    """Raises ValueError if files cannot be written under `storage`, or the disk is nearly full."""
    # Unlike Path.exists, os.path.exists says no where one may not look.
    existing = next(path for path in (storage, *storage.parents) if os.path.exists(path))
    if not existing.is_dir():
        raise ValueError(f"storage {str(storage)!r}: {str(existing)!r} is a file; choose another run.storage")
    marker = existing / f".shoal-{uuid.uuid4().hex}"
    try:
        write_text(marker, "written by the check before a search")
        marker.unlink()
    except OSError as error:
        raise ValueError(
            f"storage {str(existing)!r} cannot be written ({error.strerror}); choose another run.storage"
        ) from error
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        raise ValueError(
            f"storage {str(existing)!r} has {free / 2**30:.1f} GiB free, less than {MIN_FREE_BYTES / 2**30:.0f} GiB; "
            "free some space or choose another run.storage"
        )


def describe_versions() -> dict[str, str]:
    """Python's and the packages' versions on this node."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}}


def _check_nodes(nodes: list[dict], storage: Path) -> None:
    """Every node sees the same storage and runs the same versions."""
    storage.mkdir(parents=True, exist_ok=True)
    marker = storage / f".shoal-{uuid.uuid4().hex}"
    write_text(marker, "written by the check before a search")
    look = ray.remote(num_cpus=0, max_retries=0)(_look_from_node)
    here = describe_versions()
    try:
        for node in nodes:
            place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            sees_marker, versions = ray.get(look.options(scheduling_strategy=place).remote(str(marker)), timeout=60)
            name = node["NodeManagerAddress"]
            if not sees_marker:
                raise ValueError(
                    f"node {name} does not see storage {str(storage)!r}: with several nodes run.storage must be a folder "
                    "that all of them share (NFS, a mounted bucket)"
                )
            for package in here:
                if versions.get(package) != here[package]:
                    raise ValueError(
                        f"node {name} runs {package} {versions.get(package)}, this machine {here[package]}: "
                        "install the same versions everywhere"
                    )
    finally:
        marker.unlink(missing_ok=True)


def _look_from_node(marker: str) -> tuple[bool, dict[str, str]]:
    return Path(marker).exists(), describe_versions()
