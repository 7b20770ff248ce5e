"""What a namespace under the `restricted` Pod Security Standard admits, and what no manifest may hold: a secret."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from shoal_services.k8s.manifests import Manifest, Pod, Problem, iter_clusters, iter_items, iter_pods, name_of
from shoal_services.search.portable import find_secrets

SECRET_NAME = re.compile(r"(PASSWORD|TOKEN|SECRET|CREDENTIAL|API_?KEY)", re.IGNORECASE)
POD_CONTEXT = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
CONTAINER_CONTEXT = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
HOST_ACCESS = ("hostNetwork", "hostPID", "hostIPC")


def check_hardening(manifests: list[Manifest]) -> list[Problem]:
    """Pods that run with more rights than they need, and secrets that stand in manifests."""
    problems = []
    for manifest in manifests:
        where = name_of(manifest)
        if manifest["kind"] == "Secret":
            problems.append(Problem("secrets", where, "a Secret's values do not belong in manifests; make it with kubectl"))
        if manifest["kind"] == "Namespace":
            labels = manifest["metadata"].get("labels", {})
            if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
                problems.append(Problem("hardening", where, "pod-security.kubernetes.io/enforce must be 'restricted'"))
        for text in (value for _, value in iter_items(manifest) if isinstance(value, str)):
            for secret in find_secrets(text):
                problems.append(Problem("secrets", where, f"a password or token stands in {secret!r}; refer to a Secret"))
            if "trust_remote_code" in text:
                problems.append(
                    Problem("hardening", where, "trust_remote_code: nothing may run code from a model's folder")
                )
        problems += [Problem("hardening", pod.where, said) for pod in iter_pods(manifest) for said in _check_pod(pod)]
        problems += [Problem("secrets", pod.where, said) for pod in iter_pods(manifest) for said in _check_variables(pod)]
    return problems


def _check_pod(pod: Pod) -> Iterator[str]:
    spec = pod.template["spec"]
    context = spec.get("securityContext", {})
    yield from (f"{name} is not allowed" for name in HOST_ACCESS if spec.get(name))
    yield from _list_differences(context, POD_CONTEXT)
    if not context.get("runAsUser"):
        yield "securityContext.runAsUser must be given, and other than 0"
    if not _needs_api(pod) and spec.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken must be false: nothing here speaks to Kubernetes' API"
    if "terminationGracePeriodSeconds" not in spec:
        yield "terminationGracePeriodSeconds must be given: what runs needs time to end"
    for volume in spec.get("volumes", []):
        if "hostPath" in volume:
            yield f"volume {volume['name']!r}: hostPath is not allowed"
        if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
            yield f"volume {volume['name']!r}: an emptyDir needs a sizeLimit, or it fills the node's disk"
    for container in pod.containers:
        context = container.get("securityContext", {})
        yield from (f"container {container['name']!r}: {said}" for said in _list_differences(context, CONTAINER_CONTEXT))
        if context.get("runAsUser") == 0:
            yield f"container {container['name']!r}: securityContext.runAsUser must not be 0"
    yield from _check_probes(pod)


def _list_differences(context: Manifest, wanted: Manifest) -> Iterator[str]:
    for key, value in wanted.items():
        if context.get(key) != value:
            yield f"securityContext.{key} must be {json.dumps(value)}"


def _needs_api(pod: Pod) -> bool:
    """Ray's autoscaler, beside the head, makes and removes pods."""
    scaling = any(cluster.get("enableInTreeAutoscaling") for cluster in iter_clusters(pod.owner))
    return scaling and pod.part == "head group"


def _check_probes(pod: Pod) -> Iterator[str]:
    """KubeRay puts probes into Ray's pods itself; a job ends by itself."""
    if pod.owner["kind"] not in ("Deployment", "StatefulSet"):
        return
    for container in pod.template["spec"]["containers"]:
        for probe in ("readinessProbe", "livenessProbe"):
            if probe not in container:
                yield f"container {container['name']!r} has no {probe}"


def _check_variables(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        for variable in container.get("env", []):
            value = variable.get("value", "")
            if SECRET_NAME.search(variable["name"]) and value and not re.fullmatch(r"\$\([A-Z_]+\)", value):
                yield f"container {container['name']!r}: {variable['name']} stands in the manifest; refer to a Secret"
