"""What objects say of each other: images and versions, claims, secrets, accounts, services, ports, selectors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from shoal_services.complaints import suggest
from shoal_services.k8s.manifests import CLUSTERS, Manifest, Pod, Problem, iter_clusters, iter_items, iter_pods, name_of
from shoal_services.k8s.render import LABELS, MOUNT
from shoal_services.k8s.serve_config import SERVE_PORT, read_applications

# Made by hand before anything is applied, as README.md says; their values are in no manifest.
SECRETS = {
    "shoal-ray-token": {"auth_token"},
    "shoal-postgres": {"password"},
    "shoal-mlflow": {"username", "password", "flask-key"},
    "shoal-api-keys": {"keys.json"},
    "shoal-hub": {"token"},
}
URL = re.compile(r"https?://([a-z][-a-z0-9.]*)(?::(\d+))?")
# Searches come and go with `shoal k8s render`; policies for their pods are there before.
SEARCH_POD = Pod({}, "", {"metadata": {"labels": LABELS}})


def check_references(manifests: list[Manifest]) -> list[Problem]:
    """References that lead nowhere, and things that must be equal and are not."""
    pods = [pod for manifest in manifests for pod in iter_pods(manifest)]
    return [
        *_check_names(manifests),
        *_check_images(manifests, pods),
        *_check_volumes(manifests, pods),
        *_check_secrets(manifests),
        *_check_urls(manifests, pods),
        *_check_selectors(manifests, pods),
    ]


def _names(manifests: list[Manifest], kind: str) -> dict[str, Manifest]:
    return {manifest["metadata"]["name"]: manifest for manifest in manifests if manifest["kind"] == kind}


def _check_names(manifests: list[Manifest]) -> Iterator[Problem]:
    """No object twice, all in one namespace."""
    seen: set[tuple[str, str]] = set()
    namespaces = {m["metadata"].get("namespace") for m in manifests if "namespace" in m["metadata"]}
    for manifest in manifests:
        key = manifest["kind"], manifest["metadata"]["name"]
        if key in seen:
            yield Problem("names", name_of(manifest), "is there twice")
        seen.add(key)
    if len(namespaces) > 1:
        told = ", ".join(sorted(str(n) for n in namespaces))
        yield Problem("names", "all", f"namespaces {told}: a short service name leads nowhere from another namespace")


def _check_images(manifests: list[Manifest], pods: list[Pod]) -> Iterator[Problem]:
    for manifest in manifests:
        for cluster in iter_clusters(manifest):
            if cluster.get("rayVersion") != version("ray"):
                message = f"rayVersion {cluster.get('rayVersion')!r} is not {version('ray')}, which Shoal is installed with"
                yield Problem("versions", name_of(manifest), message)
    for pod in pods:
        for container in pod.containers:
            image = container.get("image", "")
            name, _, tag = image.rpartition(":")
            if not name or tag == "latest" or "/" in tag:
                yield Problem("versions", pod.where, f"image {image!r} must have a tag, and another than 'latest'")
            elif pod.owner["kind"] in CLUSTERS and tag != version("ray"):
                yield Problem("versions", pod.where, f"image {image!r} is not tagged {version('ray')}, the version of Ray")


def _check_volumes(manifests: list[Manifest], pods: list[Pod]) -> Iterator[Problem]:
    known = {kind: _names(manifests, kind) for kind in ("PersistentVolumeClaim", "ConfigMap", "ServiceAccount")}
    templates = {
        template["metadata"]["name"]
        for manifest in manifests
        for template in manifest.get("spec", {}).get("volumeClaimTemplates", [])
    }
    users: dict[str, set[str]] = {}
    for pod in pods:
        spec = pod.template["spec"]
        volumes = spec.get("volumes", [])
        claims = [v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v]
        wanted = [
            ("ServiceAccount", spec.get("serviceAccountName")),
            *(("PersistentVolumeClaim", claim) for claim in claims),
        ]
        wanted += [("ConfigMap", volume["configMap"].get("name")) for volume in volumes if "configMap" in volume]
        for kind, name in wanted:
            if name not in known[kind]:
                yield Problem("references", pod.where, f"{kind} {name!r} is not there{suggest(str(name), known[kind])}")
        for claim in claims:
            users.setdefault(claim, set()).add(pod.where)
        for container in pod.containers:
            yield from _check_mounts(pod, container, {volume["name"] for volume in volumes} | templates)
    for claim, manifest in known["PersistentVolumeClaim"].items():
        if len(mounted := users.get(claim, ())) > 1 and "ReadWriteMany" not in manifest["spec"]["accessModes"]:
            yield Problem("storage", name_of(manifest), f"{len(mounted)} pods mount it: it must be ReadWriteMany")


def _check_mounts(pod: Pod, container: Manifest, known: set[str]) -> Iterator[Problem]:
    mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
    for name in sorted(set(mounts) - known):
        yield Problem("references", pod.where, f"mounts volume {name!r}, which the pod has not{suggest(name, known)}")
    if pod.owner["kind"] in CLUSTERS and pod.part != "submitter" and container in pod.template["spec"]["containers"]:
        storage = mounts.get("storage")
        if storage != MOUNT:
            yield Problem("storage", pod.where, f"shared storage is at {storage!r}; it must be at {MOUNT} in every Ray pod")


def _check_secrets(manifests: list[Manifest]) -> Iterator[Problem]:
    """References lead to secrets and keys that README.md tells to make."""
    for manifest in manifests:
        for place, value in iter_items(manifest):
            if place == "secretKeyRef":
                keys = [(value["name"], value["key"])]
            elif place == "secret" and "secretName" in value:
                keys = [(value["secretName"], item.get("key")) for item in value.get("items", [{}])]
            elif place == "authOptions" and "secretName" in value:
                keys = [(value["secretName"], "auth_token")]
            else:
                continue
            for name, key in keys:
                if name not in SECRETS:
                    said = f"secret {name!r} is not one that README.md tells to make{suggest(name, SECRETS)}"
                    yield Problem("references", name_of(manifest), said)
                elif key is not None and key not in SECRETS[name]:
                    said = f"secret {name!r} has no key {key!r}{suggest(key, SECRETS[name])}"
                    yield Problem("references", name_of(manifest), said)


def _check_urls(manifests: list[Manifest], pods: list[Pod]) -> Iterator[Problem]:
    """Service names in URLs exist, on these ports; the port of a service is one that its pods open."""
    services = _names(manifests, "Service")
    for where, text in [(name_of(m), text) for m in manifests for text in _list_urls_of(m)]:
        for host, port in URL.findall(text):
            name = host.split(".")[0]
            if "." in host and not host.endswith((".svc", ".svc.cluster.local")):
                continue
            if name not in services:
                yield Problem("references", where, f"{text!r}: there is no service {name!r}{suggest(name, services)}")
            elif port and int(port) not in {p["port"] for p in services[name]["spec"]["ports"]}:
                yield Problem("references", where, f"{text!r}: service {name!r} has no port {port}")
    for service in services.values():
        served = [pod for pod in pods if _matches({"matchLabels": service["spec"].get("selector", {})}, pod)]
        ports = [port for pod in served for container in pod.containers for port in container.get("ports", [])]
        opened = {key for port in ports for key in (port.get("name"), port["containerPort"])}
        for port in service["spec"]["ports"]:
            if (target := port.get("targetPort", port["port"])) not in opened:
                said = f"port {port['port']} leads to {target!r}, which no pod opens"
                yield Problem("references", name_of(service), said)


def _list_urls_of(manifest: Manifest) -> list[str]:
    """Where a URL of ours may stand: a job's entrypoint, the Serve settings' tracking server."""
    if manifest["kind"] == "RayJob":
        return [manifest["spec"].get("entrypoint", "")]
    if manifest["kind"] == "RayService":
        return [a["args"]["tracking_uri"] for a in read_applications(manifest) if a.get("args", {}).get("tracking_uri")]
    return []


def _check_selectors(manifests: list[Manifest], pods: list[Pod]) -> Iterator[Problem]:
    """Every policy and budget selects something, every pod is under a policy, and the port of Serve is open."""
    policies = [manifest for manifest in manifests if manifest["kind"] == "NetworkPolicy"]
    for manifest in [*policies, *(m for m in manifests if m["kind"] == "PodDisruptionBudget")]:
        selector = manifest["spec"].get("podSelector", manifest["spec"].get("selector", {}))
        if pods and not any(_matches(selector, pod) for pod in [*pods, SEARCH_POD]):
            yield Problem("references", name_of(manifest), f"selects no pod: {selector}")
    for pod in pods if policies else ():
        own = [p for p in policies if p["spec"]["podSelector"] and _matches(p["spec"]["podSelector"], pod)]
        if not own:
            yield Problem("network", pod.where, "no NetworkPolicy is for this pod; it would be cut off, or open to all")
        elif pod.owner["kind"] == "RayService" and SERVE_PORT not in _list_open_ports(own):
            yield Problem("network", pod.where, f"no NetworkPolicy lets other namespaces reach port {SERVE_PORT}")
    if policies and not any(_denies_all(policy["spec"]) for policy in policies):
        yield Problem("network", "NetworkPolicy", "none denies what the others do not allow (podSelector: {}, no rules)")


def _denies_all(spec: Manifest) -> bool:
    types = set(spec.get("policyTypes", []))
    return spec["podSelector"] == {} and types == {"Ingress", "Egress"} and not (spec.get("ingress") or spec.get("egress"))


def _list_open_ports(policies: list[Manifest]) -> set[Any]:
    """Ports that whole namespaces may reach."""
    rules = [rule for policy in policies for rule in policy["spec"].get("ingress", [])]
    wide = [rule for rule in rules if any("podSelector" not in peer for peer in rule.get("from", [{}]))]
    return {port.get("port") for rule in wide for port in rule.get("ports", [])}


def _matches(selector: Manifest, pod: Pod) -> bool:
    """Whether a label selector selects the pod."""
    labels = pod.template.get("metadata", {}).get("labels", {})
    for expression in selector.get("matchExpressions", []):
        if expression["operator"] == "In" and labels.get(expression["key"]) not in expression["values"]:
            return False
        if expression["operator"] == "Exists" and expression["key"] not in labels:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
