"""serveConfigV2, read strictly: Ray's own schema passes over keys that it does not know."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import yaml

from shoal_services.complaints import explain_validation
from shoal_services.k8s.manifests import Manifest, Problem, name_of

BUILDER = "shoal_services.serving.app:build"
SERVE_PORT = 8000


def check_serve_config(manifests: list[Manifest]) -> list[Problem]:
    """What is wrong with the Serve configuration of each RayService."""
    services = [manifest for manifest in manifests if manifest["kind"] == "RayService"]
    return [Problem("serve", name_of(m), complaint) for m in services for complaint in _check(m["spec"])]


def read_applications(manifest: Manifest) -> list[dict[str, Any]]:
    """A RayService's applications."""
    return (yaml.safe_load(manifest["spec"].get("serveConfigV2", "")) or {}).get("applications", [])


def _check(spec: Manifest) -> Iterator[str]:
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        config = yaml.safe_load(spec.get("serveConfigV2", ""))
        ServeDeploySchema.model_validate(config, extra="forbid")
    except yaml.YAMLError as error:
        yield f"serveConfigV2 is not YAML: {' '.join(str(error).split())}"
    except ValidationError as error:
        yield from explain_validation(error, ServeDeploySchema, "serveConfigV2").splitlines()
    else:
        yield from _check_http(config)
        for application in config["applications"]:
            yield from _check_application(application)


def _check_http(config: dict[str, Any]) -> Iterator[str]:
    """KubeRay probes Serve's proxies: they must be on every node, and listen beyond it."""
    http = config.get("http_options", {})
    if config.get("proxy_location", "EveryNode") != "EveryNode":
        yield f"proxy_location {config['proxy_location']!r}: KubeRay's probes need EveryNode"
    if http.get("host", "0.0.0.0") != "0.0.0.0":
        yield f"http_options.host {http['host']!r}: the pods' service cannot reach it; say 0.0.0.0"
    if http.get("port", SERVE_PORT) != SERVE_PORT:
        yield f"http_options.port {http['port']}: KubeRay's service leads to {SERVE_PORT}"
    if http.get("request_timeout_s"):
        yield f"http_options.request_timeout_s {http['request_timeout_s']} cuts answers that still come; leave it out"


def _check_application(application: dict[str, Any]) -> Iterator[str]:
    path = application["import_path"]
    module, _, attribute = path.replace(":", ".").rpartition(".")
    try:
        getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        yield f"import_path {path!r} leads nowhere: {error}"
        return
    if application.get("runtime_env"):
        yield "runtime_env: code and packages belong in the image"
    if path == BUILDER:
        from shoal_services.serving.app import read_settings

        try:
            read_settings(application.get("args", {}))
        except ValueError as error:
            yield f"args: {str(error).removeprefix('args: ')}"
        if application.get("route_prefix", "/") is not None:
            yield "route_prefix must be null: requests go to the gateway, an application that this one deploys"
