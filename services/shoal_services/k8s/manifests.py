"""Manifests as plain objects: read from YAML, or built from a folder that `kubectl apply -k` takes.

Of kustomize this is the part that `k8s/` keeps to (resources, namespace, images, patches after RFC 6902), so that
manifests can be checked where no kubectl is. Anything else in a kustomization is refused, not passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Manifest = dict[str, Any]
KUSTOMIZATION = "kustomization.yaml"
KNOWN_KEYS = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
CLUSTER_WIDE = {"Namespace", "PersistentVolume", "StorageClass", "PriorityClass", "ClusterRole", "ClusterRoleBinding"}
# Where a kind keeps its pod template.
TEMPLATES = {
    "Deployment": ("template",),
    "StatefulSet": ("template",),
    "DaemonSet": ("template",),
    "Job": ("template",),
    "CronJob": ("jobTemplate", "spec", "template"),
}
CLUSTERS = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}


class Problem(NamedTuple):
    """What a check has found: the check's name, the object, and what is wrong with it."""

    check: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} [{self.check}]"


class Pod(NamedTuple):
    """A pod template: the object it is in, its path there (`ray-head`, `worker group cpu`, …), and itself."""

    owner: Manifest
    part: str
    template: Manifest

    @property
    def where(self) -> str:
        return f"{name_of(self.owner)}{f', {self.part}' if self.part else ''}"

    @property
    def containers(self) -> list[Manifest]:
        """Those that start first, too."""
        return [*self.template["spec"].get("initContainers", []), *self.template["spec"].get("containers", [])]


def name_of(manifest: Manifest) -> str:
    """`RayJob/search-demo`."""
    return f"{manifest.get('kind')}/{(manifest.get('metadata') or {}).get('name')}"


def read_manifests(path: Path) -> list[Manifest]:
    """The objects of a YAML file, of a folder of them, or of a kustomization. Raises ValueError for what cannot be read."""
    if path.is_dir():
        if (path / KUSTOMIZATION).is_file():
            return build(path)
        files = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
        if not files:
            raise ValueError(f"{str(path)!r} holds no YAML files; give a folder of manifests, as k8s/overlays/cpu-dev")
        return [manifest for file in files for manifest in read_manifests(file)]
    try:
        return parse_manifests(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}; check the path") from error


def parse_manifests(text: str, source: str) -> list[Manifest]:
    """The objects of YAML text. Raises ValueError for YAML that is none, or holds something else than objects."""
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise ValueError(f"{source!r} is not YAML: {' '.join(str(error).split())}") from error
    for document in documents:
        if not isinstance(document, dict) or not {"apiVersion", "kind"} <= set(document):
            raise ValueError(f"{source!r} holds a document without apiVersion and kind; every manifest needs both")
    return documents


def build(folder: Path) -> list[Manifest]:
    """What `kubectl kustomize FOLDER` prints. Raises ValueError for a kustomization that needs more than is known here."""
    kustomization = yaml.safe_load((folder / KUSTOMIZATION).read_text(encoding="utf-8"))
    if unknown := sorted(set(kustomization) - KNOWN_KEYS):
        raise ValueError(
            f"{str(folder / KUSTOMIZATION)!r} says {unknown[0]!r}, which only kustomize knows: "
            "kubectl kustomize FOLDER | shoal k8s check -"
        )
    manifests = [manifest for name in kustomization.get("resources", []) for manifest in read_manifests(folder / name)]
    for patch in kustomization.get("patches", []):
        _apply(patch, folder, manifests)
    for manifest in manifests:
        _set_namespace(manifest, kustomization.get("namespace"))
        _set_images(manifest, {image["name"]: image for image in kustomization.get("images", [])})
    return manifests


def iter_clusters(manifest: Manifest) -> Iterator[Manifest]:
    """The Ray cluster in a RayCluster, RayJob or RayService; nothing for other kinds."""
    if manifest.get("kind") in CLUSTERS and (cluster := _descend(manifest["spec"], CLUSTERS[manifest["kind"]])):
        yield cluster


def iter_pods(manifest: Manifest) -> Iterator[Pod]:
    """Every pod template in an object."""
    kind = manifest.get("kind")
    if kind in TEMPLATES and (template := _descend(manifest["spec"], TEMPLATES[kind])):
        yield Pod(manifest, "", template)
    for cluster in iter_clusters(manifest):
        yield Pod(manifest, "head group", cluster["headGroupSpec"]["template"])
        for group in cluster.get("workerGroupSpecs", []):
            yield Pod(manifest, f"worker group {group.get('groupName')}", group["template"])
    if kind == "RayJob" and "submitterPodTemplate" in manifest["spec"]:
        yield Pod(manifest, "submitter", manifest["spec"]["submitterPodTemplate"])


def iter_items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep; the items of a list have the key ''."""
    inside = value.items() if isinstance(value, dict) else [("", item) for item in value] if isinstance(value, list) else ()
    for key, inner in inside:
        yield key, inner
        yield from iter_items(inner)


def _descend(value: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        value = (value or {}).get(key)
    return value


def _apply(patch: dict[str, Any], folder: Path, manifests: list[Manifest]) -> None:
    """Applies one patch to whatever its target names, in place."""
    import jsonpatch

    operations = yaml.safe_load(patch.get("patch") or (folder / patch["path"]).read_text(encoding="utf-8"))
    if not isinstance(operations, list):
        raise ValueError(f"{str(folder)!r}: a patch is no list of operations (op, path, value), which alone are known here")
    target = patch["target"]
    wanted = [m for m in manifests if m["kind"] == target["kind"] and m["metadata"]["name"] == target["name"]]
    if not wanted:
        raise ValueError(f"{str(folder)!r}: a patch is for {target['kind']}/{target['name']}, which is not there")
    try:
        for manifest in wanted:
            jsonpatch.apply_patch(manifest, operations, in_place=True)
    except jsonpatch.JsonPatchException as error:
        raise ValueError(f"{str(folder)!r}: the patch of {name_of(wanted[0])} does not apply: {error}") from error


def _set_namespace(manifest: Manifest, namespace: str | None) -> None:
    if namespace is None:
        return
    if manifest["kind"] == "Namespace":
        manifest["metadata"]["name"] = namespace
    elif manifest["kind"] not in CLUSTER_WIDE:
        manifest["metadata"]["namespace"] = namespace


def _set_images(manifest: Manifest, images: dict[str, dict[str, str]]) -> None:
    """Gives images another name or tag wherever containers are, as kustomize does."""
    for key, containers in iter_items(manifest):
        for container in containers if key in ("containers", "initContainers") else ():
            name, _, tag = container["image"].partition(":")
            if change := images.get(name):
                container["image"] = f"{change.get('newName', name)}:{change.get('newTag', tag)}"
