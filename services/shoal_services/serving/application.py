"""A variant as a Serve application: its name, its replicas and limits, and how it is with it."""

from __future__ import annotations

import re
from typing import Any, cast

from ray import serve
from ray.serve.schema import ApplicationStatus

from shoal_services.serving.http.server import find_grace_s
from shoal_services.serving.replica.variant import Variant
from shoal_services.serving.settings import ServeSettings

VARIANT = "variant"
# Calls on their way to being refused by a replica.
REFUSED_AT_ONCE = 16


def make_safe(name: str) -> str:
    """A variant's name as Serve takes it, in names of applications and of files: `org/name` → org-name."""
    return re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)


def is_running(app: str) -> bool:
    """Whether it serves already: it was rolled back to, or somebody before us has deployed it."""
    status = serve.status().applications.get(app)
    return status is not None and status.status == ApplicationStatus.RUNNING


def make_application(name: str, place: str, settings: ServeSettings) -> serve.Application:
    """The application of the variant `name`, whose weights are at `place`."""
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


def find_problem(app: str) -> str | None:
    """The last line of what Serve says about a deployment that failed: the error that the replica raised."""
    status = serve.status().applications.get(app)
    messages = [deployment.message for deployment in status.deployments.values()] if status else []
    lines = [line.strip() for message in messages for line in message.splitlines() if "Error" in line]
    return lines[-1] if lines else None
