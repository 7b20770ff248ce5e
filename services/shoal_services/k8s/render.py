"""One search as a RayJob: its YAML in a ConfigMap, a Ray cluster of the size that its `run` asks for."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from shoal_services.k8s.manifests import Manifest
from shoal_services.k8s.operator_rules import MAX_NAME
from shoal_services.search.config import Run, SearchConfig
from shoal_services.search.portable import refuse_secrets, require_mounted, require_reachable

MOUNT = "/mnt/shoal"
CONFIG_FOLDER = "/etc/shoal/search"
LABELS = {"app.kubernetes.io/part-of": "shoal", "app.kubernetes.io/component": "search"}
HEAD = {"cpu": "2", "memory": "8Gi"}
SUBMITTER = {"cpu": "500m", "memory": "512Mi"}
GRACE_S = 60
TRACKING_URI = "http://mlflow:5000"
SECRETS_ADVICE = (
    "leave it out: pods have MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD from the Secret shoal-mlflow, and "
    "HF_TOKEN from shoal-hub, as k8s/README.md says"
)
QUANTITY = re.compile(r"\d+(\.\d+)?([kMGT]|[KMGT]i)?")
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


@dataclass(frozen=True)
class Place:
    """Where a search runs: names of things that are in the cluster already, and what a worker pod has.

    `tracking_uri`: what the search's file says, if None, and otherwise the server that Shoal's manifests make.
    `workers_per_pod`: Ray Train workers in one pod, where GPUs of one node can reach each other directly.
    """

    namespace: str = "shoal"
    image: str | None = None
    claim: str = "shoal-storage"
    tracking_uri: str | None = None
    queue: str | None = "shoal"
    memory: str = "8Gi"
    scratch: str = "20Gi"
    workers_per_pod: int = 1

    @property
    def pinned_image(self) -> str:
        """The image; by default Shoal's, tagged with the version of Ray that is installed here."""
        return self.image or f"shoal:{version('ray')}"


def render_search(config: SearchConfig, text: str, place: Place) -> list[Manifest]:
    """ConfigMap and RayJob for the search that `text` (the YAML of `config`) describes.

    Raises ValueError for names that Kubernetes does not take, and for what pods would not find or everyone would read.
    """
    storage, tracking_uri = check_search(config, text, place)
    name = f"search-{re.sub('[^a-z0-9]+', '-', config.name.lower()).strip('-')}"
    if len(name) > MAX_NAME["RayJob"]:
        raise ValueError(f"name: {config.name!r} is too long for a RayJob ({len(name)} letters); choose one of 40 or fewer")
    metadata = {"name": name, "namespace": place.namespace, "labels": LABELS}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"search.yaml": text}}
    queue = {"kueue.x-k8s.io/queue-name": place.queue} if place.queue else {}
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {**metadata, "labels": LABELS | queue},
        "spec": {
            "entrypoint": f"shoal search {CONFIG_FOLDER}/search.yaml --address auto --storage {shlex.quote(storage)} "
            f"--tracking-uri {shlex.quote(tracking_uri)}",
            "submissionMode": "K8sJobMode",
            "submitterConfig": {"backoffLimit": 5},
            "submitterPodTemplate": _make_submitter(place),
            # A search goes on where it stopped: another cluster may finish it.
            "backoffLimit": 2,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "preRunningDeadlineSeconds": 1800,
            "rayClusterSpec": _make_cluster(config.run, name, place),
        },
    }
    return [config_map, job]


def check_search(config: SearchConfig, text: str, place: Place) -> tuple[str, str]:
    """The storage and the tracking server that the search has in its pods. Raises ValueError as `render_search` does."""
    storage, tracking_uri = config.run.storage, place.tracking_uri or config.run.tracking_uri or TRACKING_URI
    for where, said in {"tracking_uri": tracking_uri, "run.storage": str(storage), "the search's file": text}.items():
        refuse_secrets(said, where, SECRETS_ADVICE)
    for option, quantity in {"memory": place.memory, "scratch": place.scratch}.items():
        if not QUANTITY.fullmatch(quantity):
            raise ValueError(f"--{option} {quantity!r} is no amount in Kubernetes; say it as 8Gi")
    for option, name in {"namespace": place.namespace, "claim": place.claim, "queue": place.queue}.items():
        if name is not None and not NAME.fullmatch(name):
            raise ValueError(f"--{option} {name!r} is no name in Kubernetes: small letters, digits and - in between")
    require_mounted(text, MOUNT)
    require_reachable(tracking_uri, MOUNT)
    if not storage.is_absolute() or storage == Path(MOUNT):
        return f"{MOUNT}/runs", tracking_uri
    if not storage.is_relative_to(MOUNT) or ".." in storage.parts:
        raise ValueError(
            f"run.storage {str(storage)!r} is not below {MOUNT}, where pods have their shared storage; say {MOUNT}/runs, "
            "or leave it out"
        )
    return str(storage), tracking_uri


def write_yaml(manifests: list[Manifest]) -> str:
    """YAML documents, long texts as blocks."""

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def write_text(dumper: Dumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, write_text)
    return yaml.dump_all(manifests, Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True)


def _make_cluster(run: Run, name: str, place: Place) -> Manifest:
    replicas, resources = size_workers(run, place)
    config = {"name": "config", "configMap": {"name": name}}
    group = {
        "groupName": "workers",
        "replicas": replicas,
        "minReplicas": replicas,
        "maxReplicas": replicas,
        "rayStartParams": {},
        "template": make_pod(_make_container("ray-worker", place, resources), _find_volumes(place)),
    }
    head = _make_container("ray-head", place, HEAD)
    head["ports"] = [{"name": n, "containerPort": p} for n, p in {"gcs": 6379, "dashboard": 8265, "metrics": 8080}.items()]
    head["volumeMounts"].append({"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True})
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token", "secretName": "shoal-ray-token"},
        "headGroupSpec": {
            # The head holds Ray's own processes and the search's; work goes to the workers.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": make_pod(head, [*_find_volumes(place), config]),
        },
        "workerGroupSpecs": [group],
    }


def size_workers(run: Run, place: Place) -> tuple[int, dict[str, str]]:
    """How many worker pods, and what each has: room for `place.workers_per_pod`, or for those that share a GPU."""
    per_pod = max(place.workers_per_pod, int(1 // run.gpus_per_worker) if 0 < run.gpus_per_worker < 1 else 1)
    total = run.most_workers * (run.max_concurrent_trials or 1)
    resources = {"cpu": str(math.ceil(run.cpus_per_worker * per_pod)), "memory": place.memory}
    if run.gpus_per_worker:
        resources["nvidia.com/gpu"] = str(math.ceil(run.gpus_per_worker * per_pod))
    return math.ceil(total / per_pod), resources


def make_pod(container: Manifest, volumes: list[Manifest]) -> Manifest:
    """A pod template that the `restricted` Pod Security Standard admits."""
    return {
        "metadata": {"labels": LABELS},
        "spec": {
            "serviceAccountName": "shoal-ray",
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": GRACE_S,
            "securityContext": {
                "runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000,
                "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": volumes,
        },
    }  # fmt: skip


def _make_container(name: str, place: Place, resources: dict[str, str]) -> Manifest:
    def secret(key: str, *, name: str, optional: bool = False) -> Manifest:
        reference = {"name": name, "key": key} | ({"optional": True} if optional else {})
        return {"valueFrom": {"secretKeyRef": reference}}

    return {
        "name": name,
        "image": place.pinned_image,
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        },
        "env": [
            {"name": "HOME", "value": "/tmp"},
            {"name": "SHOAL_CACHE", "value": f"{MOUNT}/cache/shoal"},
            {"name": "HF_HOME", "value": f"{MOUNT}/cache/huggingface"},
            {"name": "HF_TOKEN", **secret("token", name="shoal-hub", optional=True)},
            {"name": "MLFLOW_TRACKING_USERNAME", **secret("username", name="shoal-mlflow")},
            {"name": "MLFLOW_TRACKING_PASSWORD", **secret("password", name="shoal-mlflow")},
        ],
        "resources": {"requests": resources, "limits": resources},
        "volumeMounts": [{"name": "storage", "mountPath": MOUNT}, {"name": "tmp", "mountPath": "/tmp"}],
    }  # fmt: skip


def _find_volumes(place: Place) -> list[Manifest]:
    storage = {"name": "storage", "persistentVolumeClaim": {"claimName": place.claim}}
    return [storage, {"name": "tmp", "emptyDir": {"sizeLimit": place.scratch}}]


def _make_submitter(place: Place) -> Manifest:
    container = _make_container("ray-job-submitter", place, SUBMITTER)
    container["env"] = container["env"][:1]
    container["volumeMounts"] = container["volumeMounts"][1:]
    return make_pod(container, _find_volumes(place)[1:])
