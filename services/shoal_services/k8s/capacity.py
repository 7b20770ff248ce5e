"""Whether what is asked for fits: containers' resources, a search's workers, a service's variants, drain times."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import yaml

from shoal_services.k8s.manifests import Manifest, Pod, Problem, iter_clusters, iter_pods, name_of
from shoal_services.k8s.serve_config import BUILDER, read_applications

UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
UNITS |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
GPU = "nvidia.com/gpu"
MIN_HEAD_BYTES = 4 * 2**30


def check_capacity(manifests: list[Manifest]) -> list[Problem]:
    """Resources that are missing, unequal or too small, and pods that are stopped before they have drained."""
    problems = []
    for manifest in manifests:
        complaints = [said for pod in iter_pods(manifest) for said in _check_resources(pod)]
        if manifest["kind"] == "RayJob":
            complaints += _check_search(manifest, manifests)
        if manifest["kind"] == "RayService":
            for application in read_applications(manifest):
                if application["import_path"] == BUILDER:
                    complaints += [*_check_variants(manifest, application), *_check_drain(manifest, application)]
        problems += [Problem("capacity", name_of(manifest), complaint) for complaint in complaints]
    return problems


def read_quantity(quantity: Any) -> float:
    """Kubernetes' quantities in units or bytes: `500m` is .5, `8Gi` is 2³³."""
    number, unit = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(quantity)).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def _check_resources(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        requests, limits = (container.get("resources", {}).get(kind, {}) for kind in ("requests", "limits"))
        told = f"{pod.part or 'pod'}, container {container['name']!r}"
        missing = [
            f"{k}.{r}" for k, v in (("requests", requests), ("limits", limits)) for r in ("cpu", "memory") if r not in v
        ]
        if missing:
            yield f"{told}: resources.{missing[0]} is missing; Ray and the scheduler would guess"
        elif read_quantity(requests["memory"]) != read_quantity(limits["memory"]):
            yield f"{told}: memory requests {requests['memory']} and limits {limits['memory']} differ; make them equal"
        elif pod.part == "head group" and read_quantity(limits["memory"]) < MIN_HEAD_BYTES:
            yield f"{told}: {limits['memory']} of memory is too little for Ray's head; give 4Gi or more"


def _find_supply(manifest: Manifest) -> dict[str, tuple[float, float]]:
    """CPUs and GPUs: the most that a worker pod has, and what all of them have once there are as many as may be."""
    (cluster,) = iter_clusters(manifest)
    groups = []
    for group in cluster.get("workerGroupSpecs", []):
        limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
        groups.append((group.get("maxReplicas", 1), {"CPU": limits.get("cpu", 0), "GPU": limits.get(GPU, 0)}))
    supply = {}
    for kind in ("CPU", "GPU"):
        sizes = [(count, read_quantity(resources[kind])) for count, resources in groups]
        supply[kind] = max([size for _, size in sizes], default=0), sum(count * size for count, size in sizes)
    return supply


def _check_search(manifest: Manifest, manifests: list[Manifest]) -> Iterator[str]:
    """The workers of one trial at least fit the workers of the cluster."""
    from shoal_services.search.config import SearchConfig

    words = shlex.split(manifest["spec"].get("entrypoint", ""))
    if words[:2] != ["shoal", "search"] or len(words) < 3:
        return
    folder, _, key = words[2].rpartition("/")
    text = _find_mounted(manifest, manifests, folder, key)
    if text is None:
        yield f"entrypoint: no ConfigMap puts {words[2]!r} into the head's pod"
        return
    try:
        run = SearchConfig.model_validate(yaml.safe_load(text)).run
    except ValueError as error:
        yield f"the search in its ConfigMap is wrong: {error}"
        return
    supply = _find_supply(manifest)
    for kind, per_worker in (("CPU", run.cpus_per_worker), ("GPU", run.gpus_per_worker)):
        largest, total = supply[kind]
        if per_worker > largest:
            yield f"a trial's worker needs {per_worker:g} {kind}s, and a worker pod has {largest:g}: it would wait for ever"
        elif per_worker * run.num_workers > total:
            yield f"a trial needs {per_worker * run.num_workers:g} {kind}s, and all worker pods have {total:g}"


def _find_mounted(manifest: Manifest, manifests: list[Manifest], folder: str, key: str) -> str | None:
    """The text that the head finds as `folder/key`, if a ConfigMap puts it there."""
    spec = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    names = {volume["name"]: volume.get("configMap", {}).get("name") for volume in spec.get("volumes", [])}
    mounts = spec["containers"][0].get("volumeMounts", [])
    wanted = next((names.get(mount["name"]) for mount in mounts if mount["mountPath"] == folder), None)
    maps = [m for m in manifests if m["kind"] == "ConfigMap" and m["metadata"]["name"] == wanted]
    return maps[0].get("data", {}).get(key) if maps else None


def _check_variants(manifest: Manifest, application: dict[str, Any]) -> Iterator[str]:
    from shoal_services.serving.app import read_settings
    from shoal_services.serving.deployments import GATEWAY_CPUS

    settings = read_settings(application.get("args", {}))
    supply = _find_supply(manifest)
    wanted = {"CPU": settings.gateways * GATEWAY_CPUS, "GPU": 0.0}
    replicas = {name: (v.cpus_per_replica, v.gpus_per_replica, v.max_replicas) for name, v in settings.variants.items()}
    replicas = {name: needs for name, needs in replicas.items() if not settings.variants[name].shared}
    if any(variant.shared for variant in settings.variants.values()):
        replicas["model_cache"] = (
            settings.model_cache.cpus_per_replica,
            settings.model_cache.gpus_per_replica,
            settings.model_cache.replicas,
        )
    for name, (cpus, gpus, count) in replicas.items():
        if not cpus and not gpus:
            yield f"{name} reserves neither CPUs nor GPUs: it could be put onto the head; set cpus_per_replica"
        for kind, needed in (("CPU", cpus), ("GPU", gpus)):
            if needed > supply[kind][0]:
                yield f"a replica of {name} needs {needed:g} {kind}s, and a worker pod has {supply[kind][0]:g}"
            wanted[kind] += needed * count
    for kind, needed in wanted.items():
        if needed > supply[kind][1]:
            yield f"all replicas need {needed:g} {kind}s, and all worker pods have {supply[kind][1]:g}"


def _check_drain(manifest: Manifest, application: dict[str, Any]) -> Iterator[str]:
    """Whatever ends an endpoint's pods or cluster waits as long as answers may go on."""
    from shoal_services.serving.app import read_settings

    drain = read_settings(application.get("args", {})).limits.drain_s
    for pod in iter_pods(manifest):
        grace = pod.template["spec"].get("terminationGracePeriodSeconds", 0)
        if pod.part.startswith("worker") and grace < drain:
            yield f"{pod.part}: terminationGracePeriodSeconds {grace} is less than limits.drain_s {drain:g}"
    delay = manifest["spec"].get("rayClusterDeletionDelaySeconds", 60)
    if delay < drain:
        yield f"rayClusterDeletionDelaySeconds {delay} is less than limits.drain_s {drain:g}"
