"""The checks before a search: resources, storage, versions, tracker, on every node. Each failure names node and remedy."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from shoal.files import require_path, write_text

from shoal_services.cluster.resources import Maximum, NodeShape, read_maximum, read_nodes
from shoal_services.console import mask_passwords
from shoal_services.tracking.registry import ping
from shoal_services.training.workers import Workers

MIN_FREE_BYTES = 2 * 2**30
VERSIONED = ("ray", "torch", "transformers", "shoal")
NODE_LIMIT_S = 60
MAX_NAMED = 8
TRACKER_LIMIT_S = 5


@dataclass(frozen=True)
class Clearance:
    """A search may begin: so many trials fit at once, and these remarks are worth a line."""

    concurrent: int
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class NodeReport:
    """What a node says of itself: versions, what it sees and can do in the storage, and which inputs it does not see."""

    node: str
    versions: dict[str, str]
    sees_marker: bool
    complaint: str | None
    own_marker: str
    unseen: tuple[str, ...] = ()


def check_cluster(run: Workers, storage: Path, inputs: Iterable[str] = ()) -> Clearance:
    """Whether a search can run on the connected cluster.

    Raises ValueError for resources that the cluster does not have and cannot get, storage that is not shared, not
    writable from every node or nearly full, package versions that differ between nodes, and of the inputs (models and
    texts) files and folders that are not everywhere. A tracker that does not answer is a remark: its records are kept and
    sent later.
    """
    check_writable(storage)
    clearance = fit_trials(run, read_nodes(), read_maximum())
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1:
        check_nodes(nodes, storage, tuple(place for place in inputs if os.path.isabs(place)))
    remarks = [remark for remark in (_look_at_tracker(run.tracking_uri),) if remark]
    return Clearance(clearance.concurrent, clearance.remarks + remarks)


def clear_cluster(run: Workers, storage: Path, remark: Callable[[str], None], inputs: Iterable[str] = ()) -> int:
    """How many trials fit at once, after `check_cluster`, whose remarks are passed on. Raises as that does."""
    clearance = check_cluster(run, storage, inputs)
    for one in clearance.remarks:
        remark(one)
    return clearance.concurrent


def fit_trials(run: Workers, nodes: dict[str, NodeShape], maximum: Maximum) -> Clearance:
    """Trials that the nodes hold at once, grown as far as the autoscaler may, at most `max_concurrent_trials`.

    Raises ValueError that says what is missing, in all or on any one node.
    """
    worker = NodeShape(cpus=run.cpus_per_worker, gpus=run.gpus_per_worker)
    slots, possible = worker.count_in(nodes.values()), worker.count_in(maximum.shapes(nodes))
    remarks = []
    if possible < run.num_workers:
        lack = _explain_lack(run, worker, nodes if maximum.groups is None else maximum.named())
        if not maximum.is_unknown:
            raise ValueError(lack)
        remarks.append(
            f"{lack}. The cluster grows by itself, and how far cannot be read from it: the search waits for nodes"
        )
    elif slots < run.num_workers:
        remarks.append("no trial fits on the nodes that are there; the cluster may grow, and the search waits for that")
    return Clearance(min(max(1, possible // run.most_workers), run.max_concurrent_trials or possible or 1), remarks)


def _explain_lack(run: Workers, worker: NodeShape, nodes: dict[str, NodeShape]) -> str:
    """What is missing: in the whole cluster, or on any one node."""
    for resource in ("cpus", "gpus"):
        per_worker, name = getattr(worker, resource), resource[:-1].upper()
        there = sum(getattr(node, resource) for node in nodes.values())
        needed = per_worker * run.num_workers
        if needed > there:
            return (
                f"a trial needs {needed:g} {name}s ({run.num_workers} workers of {per_worker:g}), and the cluster has "
                f"{there:g}; lower run.num_workers or run.{resource}_per_worker, or add nodes"
            )
    each = [f"{name} has {shape} and holds {worker.count_in([shape])}" for name, shape in sorted(nodes.items())]
    told = ", ".join(each[:MAX_NAMED]) + (f", and {len(each) - MAX_NAMED} more" if len(each) > MAX_NAMED else "")
    return (
        f"a worker needs {worker} on one node, and a trial has {run.num_workers} of them; {told}; "
        "lower run.cpus_per_worker, run.gpus_per_worker or run.num_workers, or add larger nodes"
    )


def check_writable(storage: Path) -> None:
    """Raises ValueError if files cannot be written under `storage`, it is a URI, or the disk is nearly full."""
    require_path(storage, "storage")
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


def check_nodes(nodes: list[dict], storage: Path, inputs: tuple[str, ...] = ()) -> None:
    """Every node runs the same versions, sees the inputs and the others' files in the storage, and writes its own.

    Raises ValueError that names the node.
    """
    storage.mkdir(parents=True, exist_ok=True)
    marker = storage / f".shoal-{uuid.uuid4().hex}"
    write_text(marker, "written by the check before a search")
    look = ray.remote(num_cpus=0, max_retries=0)(look_from_node)
    looks = {}
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        name = node["NodeManagerAddress"]
        looks[look.options(scheduling_strategy=place).remote(name, str(marker), inputs)] = name
    try:
        silent = ray.wait(list(looks), num_returns=len(looks), timeout=NODE_LIMIT_S)[1]
        if silent:
            names = ", ".join(looks[task] for task in silent)
            raise ValueError(
                f"node {names} has not answered for {NODE_LIMIT_S} s: it can start no worker; look at `ray status` and the "
                "node's logs, or take it out of the cluster"
            )
        require_equal(ray.get(list(looks)), describe_versions(), storage)
    finally:
        for file in storage.glob(f"{marker.name}*"):
            file.unlink(missing_ok=True)


def look_from_node(node: str, marker: str, inputs: tuple[str, ...]) -> NodeReport:
    """A node's report; leaves a marker of its own beside `marker`. Runs on the node."""
    own = f"{marker}-{uuid.uuid4().hex}"
    sees_marker, complaint = Path(marker).exists(), None
    try:
        check_writable(Path(marker).parent)
        if sees_marker:
            write_text(Path(own), "written by a node in the check before a search")
    except (ValueError, OSError) as error:
        complaint = str(error)
    unseen = tuple(place for place in inputs if not os.path.exists(place))
    return NodeReport(node, describe_versions(), sees_marker, complaint, own, unseen)


def require_equal(reports: Iterable[NodeReport], here: dict[str, str], storage: Path) -> None:
    """Raises ValueError for the first node whose versions or storage differ from this machine's."""
    for report in reports:
        for package, wanted in here.items():
            if report.versions.get(package) != wanted:
                raise ValueError(
                    f"node {report.node} runs {package} {report.versions.get(package)}, this machine {wanted}: "
                    "install the same versions everywhere"
                )
        if not report.sees_marker:
            raise ValueError(
                f"node {report.node} does not see storage {str(storage)!r}: with several nodes run.storage must be a "
                "folder that all of them share (NFS, a mounted bucket)"
            )
        if report.complaint:
            raise ValueError(f"node {report.node}: {report.complaint}")
        if not Path(report.own_marker).exists():
            raise ValueError(
                f"what node {report.node} writes to storage {str(storage)!r} is not seen here: the two do not share it, or "
                "one of them mounts it with a cache that hides new files"
            )
        if report.unseen:
            raise ValueError(
                f"node {report.node} does not see {report.unseen[0]!r}: models and texts that are no Hub ids lie where all "
                "nodes see them, under one path (NFS, a mounted bucket)"
            )


def _look_at_tracker(uri: str | None) -> str | None:
    """A remark if the tracking server does not answer, or not to us: a search goes on without it."""
    url = urlsplit(uri or "")
    if url.scheme not in ("http", "https") or not url.hostname:
        return None
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname, port), timeout=TRACKER_LIMIT_S).close()
        ping(url.geturl())
    except (OSError, RuntimeError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        return (
            f"tracking server {mask_passwords(uri or '')} does not answer {platform.node()} ({reason}); the search goes "
            "on, and its records wait in the folder until the server is up: check run.tracking_uri"
        )
    return None
