"""The story of serving: resolve models → a Serve application for each variant → the gateway, told where they are.

A variant's application carries its version in its name. Another version is another application beside the first: the
gateway changes over once it is healthy, and the first goes when its requests are done. No request sees the change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from ray import serve
from ray.serve.schema import LoggingConfig

from shoal_services.cluster import connect
from shoal_services.serving.gateway import Gateway
from shoal_services.serving.guard import KeyRing
from shoal_services.serving.settings import ServeSettings, VariantSettings
from shoal_services.serving.sources import REGISTRY, find_version
from shoal_services.serving.variant import Variant
from shoal_services.serving.web import make_app

GATEWAY = "gateway"
DRAIN_S = 30.0


@dataclass
class Endpoint:
    """What is deployed: for each public name, the application that answers and the place its weights came from."""

    settings: ServeSettings
    apps: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    previous: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://{self.settings.host}:{self.settings.port}"

    def start(self, listen: Callable[[str, int, int], None]) -> None:
        """Brings everything up; returns when every variant with a replica has answered its health check."""
        listen("start Ray", 0, 1)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        connect(self.settings.address)
        http = {"host": self.settings.host, "port": self.settings.port, "request_timeout_s": None}
        serve.start(http_options=http, logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False))
        listen("start Ray", 1, 1)
        names = list(self.settings.variants)
        for done, name in enumerate(names):
            listen("start variants", done, len(names))
            self.roll_out(name, resolve(self.settings.variants[name].model, self.settings.tracking_uri))
        listen("start variants", len(names), len(names))
        self._tell_gateway()

    def roll_out(self, name: str, place: str) -> bool:
        """Serves variant `name` from `place`; False if that is what it does already."""
        variant = self.settings.variants[name]
        app = f"{name}-{find_version(place, variant.dtype)}"
        if self.apps.get(name) == app:
            return False
        serve.run(_make_variant(place, variant, self.settings), name=app, route_prefix=None)
        if name in self.apps:
            self.previous[name] = self.apps[name], self.places[name]
        self.apps[name], self.places[name] = app, place
        return True

    def _tell_gateway(self) -> None:
        keys = KeyRing.load(self.settings.keys) if self.settings.keys else KeyRing([])
        app = make_app(keys, max_body_bytes=self.settings.limits.max_body_bytes)
        deployment = cast(serve.Deployment, serve.deployment(serve.ingress(app)(Gateway))).options(
            name=GATEWAY, num_replicas=self.settings.gateways, max_ongoing_requests=4096,
            ray_actor_options={"num_cpus": 0}, user_config=self._describe(), graceful_shutdown_timeout_s=DRAIN_S,
        )  # fmt: skip
        serve.run(deployment.bind(self.settings.limits.model_dump()), name=GATEWAY, route_prefix="/")

    def _describe(self) -> dict[str, Any]:
        variants = {
            name: {
                "app": app,
                **self.settings.variants[name].model_dump(include={"perplexity", "num_parameters"}),
                "source": self.places[name],
            }
            for name, app in self.apps.items()
        }
        return {"variants": variants, "routes": self.settings.routes}

    def stop(self) -> None:
        """Lets running requests finish, then ends Serve."""
        serve.shutdown()


def resolve(model: str, tracking_uri: str | None) -> str:
    """Where a model's weights are. Raises ValueError for a registry name that leads nowhere."""
    if not model.startswith(REGISTRY):
        return model
    from shoal_services.registry import find_registered

    return find_registered(model, tracking_uri)


def _make_variant(place: str, variant: VariantSettings, settings: ServeSettings) -> serve.Application:
    limits = settings.limits
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
        name="variant",
        max_ongoing_requests=2 * limits.max_batch_size,
        max_queued_requests=limits.max_queued,
        ray_actor_options={"num_cpus": variant.cpus_per_replica, "num_gpus": variant.gpus_per_replica},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=DRAIN_S,
        **scaling,
    )
    return deployment.bind(place, variant.dtype, limits.model_dump())
