"""What is deployed on Serve, with its options: a variant, the model cache, the observer, and the gateway at either door."""

from __future__ import annotations

import re
import time
from typing import Any, cast

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus
from shoal.recipe import fingerprint

from shoal_services.serving.http.server import GatewayServer, ProxiedGateway, find_grace_s
from shoal_services.serving.observer import Observer
from shoal_services.serving.replica.model_cache import define_model_cache
from shoal_services.serving.replica.variant import Variant
from shoal_services.serving.settings import ServeSettings

VARIANT, MODEL_CACHE, GATEWAY, OBSERVER = "variant", "model_cache", "gateway", "observer"
# Calls on their way to being refused by a replica.
REFUSED_AT_ONCE = 16
# Without a version of ours, Serve makes one up and starts new replicas at every call; with an equal one it only calls
# `reconfigure`.
CODE_VERSION = "1"
# A gateway on a head node that offers no CPUs would take memory that Ray's own processes need.
GATEWAY_CPUS = 0.5


def make_safe(name: str) -> str:
    """A variant's name as Serve takes it, in names of applications and of files: `org/name` → org-name."""
    return re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)


def make_variant(name: str, place: str, settings: ServeSettings) -> serve.Application:
    """The variant `name`, whose weights are at `place`."""
    variant, limits = settings.variants[name], settings.limits
    scaling: dict[str, Any] = {"num_replicas": variant.max_replicas}
    if variant.min_replicas != variant.max_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": variant.min_replicas, "max_replicas": variant.max_replicas,
                "target_ongoing_requests": max(1, limits.max_batch_size // 2), "upscale_delay_s": 2,
                "downscale_delay_s": variant.idle_s,
            }
        }  # fmt: skip
    deployment = cast(serve.Deployment, serve.deployment(Variant)).options(
        name=VARIANT,
        # The replica itself refuses what is over its limits; behind this, requests wait only where none is up.
        max_ongoing_requests=limits.max_batch_size + limits.max_queued + REFUSED_AT_ONCE,
        max_queued_requests=max(1, limits.max_queued),  # Serve refuses everything at 0
        ray_actor_options={"num_cpus": variant.cpus_per_replica, "num_gpus": variant.gpus_per_replica},
        max_constructor_retry_count=2,
        health_check_period_s=1,
        graceful_shutdown_timeout_s=find_grace_s(limits),
        **scaling,
    )
    return deployment.bind(name, place, variant.model_dump(), limits.model_dump())


def make_model_cache(models: dict[str, dict[str, Any]], settings: ServeSettings) -> serve.Application:
    """The process that shared variants live in; `models` are those that may be asked for, by id."""
    cache, limits = settings.model_cache, settings.limits
    deployment = cast(serve.Deployment, serve.deployment(define_model_cache(cache.max_loaded))).options(
        _internal=True, version=fingerprint([CODE_VERSION, cache.model_dump(), limits.model_dump()]),
        name=MODEL_CACHE, num_replicas=cache.replicas, user_config=models,
        max_ongoing_requests=cache.max_loaded * (limits.max_batch_size + limits.max_queued) + REFUSED_AT_ONCE,
        max_queued_requests=max(1, limits.max_queued), health_check_period_s=1,
        graceful_shutdown_timeout_s=find_grace_s(limits),
        ray_actor_options={"num_cpus": cache.cpus_per_replica, "num_gpus": cache.gpus_per_replica},
    )  # fmt: skip
    return deployment.bind(limits.model_dump())


def make_observer(settings: ServeSettings) -> serve.Application:
    """The observer, which writes to files of this machine."""
    deployment = cast(serve.Deployment, serve.deployment(Observer)).options(ray_actor_options=_stay_here())
    session = time.strftime("%Y-%m-%d %H:%M:%S")
    return deployment.bind(
        str(settings.results.resolve()), settings.tracking_uri, settings.experiment, settings.report_every_s, session
    )


def make_gateway(config: dict[str, Any], settings: ServeSettings, *, proxied: bool) -> serve.Application:
    """The gateway, told `config`: behind Serve's proxies wherever there is room, or listening itself on this machine."""
    door: type[Any] = serve.ingress()(ProxiedGateway) if proxied else GatewayServer
    arguments: tuple[Any, ...] = () if proxied else (settings.host, settings.port)
    actor_options: dict[str, Any] = {"num_cpus": GATEWAY_CPUS} if proxied else _stay_here()
    deployment = cast(serve.Deployment, serve.deployment(door)).options(
        _internal=True, version=CODE_VERSION, name=GATEWAY, num_replicas=settings.gateways, user_config=config,
        ray_actor_options=actor_options, health_check_period_s=1,
        # What is too much is refused by the variants, in OpenAI's words; streams last as long as they like.
        max_ongoing_requests=1000, graceful_shutdown_timeout_s=find_grace_s(settings.limits),
    )  # fmt: skip
    return deployment.bind(*arguments)


def _stay_here() -> dict[str, Any]:
    """Options of an actor that belongs on this machine: it listens on its port, or writes to its files."""
    return {"num_cpus": 0, "resources": {f"node:{ray.util.get_node_ip_address()}": 0.001}}


def is_running(app: str) -> bool:
    """Whether it serves already: it was rolled back to, or somebody before us has deployed it."""
    status = serve.status().applications.get(app)
    return status is not None and status.status == ApplicationStatus.RUNNING


def find_problem(app: str) -> str | None:
    """The last line of what Serve says about a deployment that failed: the error that the replica raised."""
    status = serve.status().applications.get(app)
    messages = [deployment.message for deployment in status.deployments.values()] if status else []
    lines = [line.strip() for message in messages for line in message.splitlines() if "Error" in line]
    return lines[-1] if lines else None
