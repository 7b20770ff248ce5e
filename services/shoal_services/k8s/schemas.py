"""Fields and types: Kubernetes' own schemas for its kinds and for every pod template, KubeRay's for its own."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from shoal_services.complaints import suggest
from shoal_services.k8s.manifests import CLUSTERS, Manifest, Problem, iter_clusters, iter_pods, name_of

KUBERNETES = "1.35"
CUSTOM = "ray.io/v1"
# Fields of KubeRay 1.7 by kind or place: what can be checked where its CRDs are not at hand. The YAML inside a pod
# template is checked by Kubernetes' schema in any case.
FIELDS = {
    "RayJob": "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus "
    "entrypointNumGpus entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec "
    "runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend "
    "ttlSecondsAfterFinished",
    "RayService": "deploymentUnhealthySecondThreshold excludeHeadPodFromServeSvc managedBy rayClusterConfig "
    "rayClusterDeletionDelaySeconds serveConfigV2 serveService serviceUnhealthySecondThreshold suspend upgradeStrategy",
    "RayCluster": "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec "
    "headServiceAnnotations historyServerOptions managedBy networkPolicy rayVersion suspend tlsOptions upgradeStrategy "
    "workerGroupSpecs",
    "headGroupSpec": "enableIngress headService ingressOptions labels rayStartParams resources serviceType template",
    "workerGroupSpecs": "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts priority rayStartParams "
    "replicas resources scaleStrategy suspend template",
    "authOptions": "enableK8sTokenAuth mode secretName",
    "autoscalerOptions": "args command env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext "
    "upscalingMode version volumeMounts",
}


def check_schemas(manifests: list[Manifest], crds: dict[str, Any]) -> list[Problem]:
    """Unknown fields, missing ones and wrong types. Raises ImportError without kubernetes-validate."""
    problems = []
    for manifest in manifests:
        if manifest.get("apiVersion") != CUSTOM:
            problems += _check_core(manifest, name_of(manifest))
            continue
        mine = _check_custom(manifest, crds)
        problems += mine
        for pod in iter_pods(manifest) if not mine else ():
            as_pod = {"apiVersion": "v1", "kind": "Pod", **pod.template}
            problems += _check_core(as_pod, pod.where)
    return problems


def read_crds(folder: Path) -> dict[str, Any]:
    """Kind → closed JSON schema of its v1: fields it does not name are errors. Raises ValueError if there is none."""
    schemas = {}
    for file in sorted(folder.glob("*.yaml")):
        definition = yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if definition.get("kind") == "CustomResourceDefinition":
            (schema,) = (v["schema"] for v in definition["spec"]["versions"] if v["name"] == "v1")
            schemas[definition["spec"]["names"]["kind"]] = _close(schema["openAPIV3Schema"])
    if not schemas:
        raise ValueError(f"{str(folder)!r} holds no CustomResourceDefinition; give the folder of KubeRay's CRD files")
    return schemas


def _check_core(manifest: Manifest, where: str) -> list[Problem]:
    complaint = _find_core_complaint(json.dumps(manifest, sort_keys=True))
    return [Problem("schema", where, complaint)] if complaint else []


# A schema is read again for each object, 30 ms: equal pods of different groups are checked once.
@functools.cache
def _find_core_complaint(text: str) -> str | None:
    """What is wrong with an object, as JSON, of Kubernetes' own kinds."""
    import kubernetes_validate

    manifest = json.loads(text)
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        path = ".".join(str(part) for part in error.path)
        return f"{path}: {error.message}" if path else error.message
    except kubernetes_validate.SchemaNotFoundError:
        kind = f"{manifest.get('apiVersion')} {manifest.get('kind')}"
        return f"Kubernetes {KUBERNETES} has no {kind}; check apiVersion and kind"
    return None


def _check_custom(manifest: Manifest, crds: dict[str, Any]) -> list[Problem]:
    if manifest["kind"] not in CLUSTERS:
        message = f"{CUSTOM} has no {manifest['kind']}{suggest(manifest['kind'], CLUSTERS)}"
        return [Problem("schema", name_of(manifest), message)]
    unknown = [Problem("schema", name_of(manifest), complaint) for complaint in _find_unknown(manifest)]
    if unknown or not crds:
        return unknown
    import jsonschema

    errors = jsonschema.Draft202012Validator(crds[manifest["kind"]]).iter_errors(manifest)
    return [
        Problem(
            "schema", name_of(manifest), f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message[:300]}"
        )
        for error in errors
    ]


def _find_unknown(manifest: Manifest) -> Iterator[str]:
    places = [(manifest["kind"], manifest.get("spec") or {})]
    for cluster in iter_clusters(manifest):
        places += [("RayCluster", cluster)] if manifest["kind"] != "RayCluster" else []
        places += [
            (name, cluster[name]) for name in ("headGroupSpec", "authOptions", "autoscalerOptions") if name in cluster
        ]
        places += [("workerGroupSpecs", group) for group in cluster.get("workerGroupSpecs", [])]
    for place, value in places:
        known = FIELDS[place].split()
        yield from (f"unknown field {key!r} in {place}{suggest(key, known)}" for key in value if key not in known)


def _close(schema: Any) -> Any:
    """The schema with unknown fields forbidden, and Kubernetes' own words for types put into JSON schema's."""
    if isinstance(schema, list):
        return [_close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = {key: _close(value) for key, value in schema.items() if key not in ("default", "properties")}
    if "properties" in schema:
        closed["properties"] = {name: _close(inner) for name, inner in schema["properties"].items()}
        closed.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return closed
