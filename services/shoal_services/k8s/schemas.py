"""Fields and types: Kubernetes' own schemas for its kinds and for every pod template, KubeRay's for its own."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import yaml

from shoal_services.complaints import suggest
from shoal_services.k8s.manifests import CLUSTERS, Manifest, Problem, iter_pods, name_of

KUBERNETES = "1.35"
CUSTOM = "ray.io/v1"
# `json.dumps(read_crds(FOLDER))` of KubeRay 1.7 (Apache-2.0), whose CRDs are a hundred times as long.
KUBERAY = Path(__file__).with_name("kuberay.json")


def check_schemas(manifests: list[Manifest], crds: Path | None = None) -> list[Problem]:
    """Unknown fields, missing ones and wrong types. Raises ImportError without kubernetes-validate."""
    schemas = read_crds(crds) if crds else json.loads(KUBERAY.read_text(encoding="utf-8"))
    problems = []
    for manifest in manifests:
        if manifest.get("apiVersion") != CUSTOM:
            problems += _check_core(manifest, name_of(manifest))
            continue
        mine = _check_custom(manifest, schemas)
        problems += mine
        for pod in iter_pods(manifest) if not mine else ():
            problems += _check_core({"apiVersion": "v1", "kind": "Pod", **pod.template}, pod.where)
    return problems


def read_crds(folder: Path) -> dict[str, Any]:
    """Kind → closed JSON schema of its v1: fields it does not name are errors. Raises ValueError if one is missing."""
    schemas = {}
    for file in sorted(folder.glob("*.yaml")):
        definition = yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if definition.get("kind") == "CustomResourceDefinition" and definition["spec"]["names"]["kind"] in CLUSTERS:
            (schema,) = (v["schema"] for v in definition["spec"]["versions"] if v["name"] == "v1")
            schemas[definition["spec"]["names"]["kind"]] = _close(schema["openAPIV3Schema"])
    if missing := sorted(set(CLUSTERS) - set(schemas)):
        raise ValueError(
            f"{str(folder)!r} holds no CustomResourceDefinition of {missing[0]}; give the folder of KubeRay's CRD files"
        )
    for kind, path in CLUSTERS.items():
        for key in path:
            schemas[kind]["properties"]["spec"]["properties"][key] = {"$ref": "#/$defs/RayCluster/properties/spec"}
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
        return _explain(error)
    except kubernetes_validate.SchemaNotFoundError:
        kind = f"{manifest.get('apiVersion')} {manifest.get('kind')}"
        return f"Kubernetes {KUBERNETES} has no {kind}; check apiVersion and kind"
    return None


def _check_custom(manifest: Manifest, schemas: dict[str, Any]) -> list[Problem]:
    import jsonschema

    kind, where = manifest["kind"], name_of(manifest)
    if kind not in schemas:
        return [Problem("schema", where, f"there is no schema for {CUSTOM} {kind}{suggest(kind, schemas)}")]
    validator = jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": schemas})
    return [Problem("schema", where, _explain(error)) for error in validator.iter_errors(manifest)]


def _explain(error: Any) -> str:
    """A validation error's place and text, with the nearest known field for each that is unknown."""
    path, known = ".".join(str(part) for part in error.absolute_path), error.schema.get("properties", {})
    unknown = [key for key in error.instance if key not in known] if error.validator == "additionalProperties" else []
    return f"{path}{': ' if path else ''}{error.message[:300]}{''.join(suggest(key, known) for key in unknown)}"


def _close(schema: Any) -> Any:
    """The schema with unknown fields forbidden, in JSON schema's own words, without what no check needs.

    Kubernetes' schema checks pod templates; a status is the operator's.
    """
    if isinstance(schema, list):
        return [_close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    properties = schema.get("properties", {})
    if "containers" in properties.get("spec", {}).get("properties", {}):
        return {"type": "object", "required": ["spec"]}
    closed = {key: _close(value) for key, value in schema.items() if key not in ("default", "format", "properties")}
    if properties:
        closed["properties"] = {name: {} if name == "status" else _close(inner) for name, inner in properties.items()}
        closed.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return closed
