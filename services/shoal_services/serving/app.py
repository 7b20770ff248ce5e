"""The endpoint as one declarative Serve application, behind Serve's own HTTP proxies: what a RayService deploys.

`import_path: shoal_services.serving.app:build`, with the settings of `serve.yaml` as `args`. The same fleet and the same
gateway as in `shoal serve`; but here nobody stays to watch: a small deployment, the rollout, keeps the variants in line
from within the cluster, and gateways ask it what there is.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Any, cast

from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from shoal.value import fingerprint

from shoal_services.complaints import explain_validation
from shoal_services.serving.deploy import Fleet
from shoal_services.serving.http.door import Door
from shoal_services.serving.http.gateway import Gateway
from shoal_services.serving.http.server import find_grace_s
from shoal_services.serving.http.web import make_app
from shoal_services.serving.settings import ServeSettings

# Settings of `shoal serve` that have no meaning here: Serve's proxies listen, on the cluster that runs the application.
NOT_HERE = ("host", "port", "address")
# A gateway on a head node that offers no CPUs would take memory that Ray's own processes need.
GATEWAY_CPUS = 0.5
ASK_FOR_S = 5.0
LOOK_EVERY_S = 0.2


def build(args: dict[str, Any]) -> serve.Application:
    """The application for these settings. Raises ValueError for settings that are wrong, or have no meaning here."""
    settings = read_settings(args)
    rollout = cast(serve.Deployment, serve.deployment(Rollout)).options(
        name="rollout", num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000,
    )  # fmt: skip
    gateway = cast(serve.Deployment, serve.deployment(serve.ingress()(Ingress))).options(
        name="gateway", num_replicas=settings.gateways, ray_actor_options={"num_cpus": GATEWAY_CPUS},
        # What is too much is refused by the variants, in OpenAI's words; streams last as long as they like.
        max_ongoing_requests=1000, max_surge_percent=100, graceful_shutdown_timeout_s=find_grace_s(settings.limits),
    )  # fmt: skip
    return gateway.bind(rollout.bind(settings.model_dump(mode="json")))


def read_settings(args: dict[str, Any]) -> ServeSettings:
    """Strict settings, which need keys unless they say otherwise: a service is reached from other machines."""
    if without_meaning := [name for name in NOT_HERE if name in args]:
        raise ValueError(f"args: {', '.join(without_meaning)} mean nothing behind Serve's proxy; leave them out")
    try:
        return ServeSettings.model_validate({"host": "0.0.0.0", **args})
    except ValidationError as error:
        raise ValueError(explain_validation(error, ServeSettings, "args")) from error


class Rollout(Fleet):
    """The fleet as a deployment of one replica: it starts the variants, then watches aliases and folders in a thread.

    A variant that is not there yet, as an alias that no search has set, joins once it is; one at least must start.
    """

    def __init__(self, settings: dict[str, Any]):
        self._ended = threading.Event()
        self._config: dict[str, Any] = {}
        super().__init__(ServeSettings.model_validate(settings))
        self.require_keys()
        problems = self.reconcile()
        if not self.served:
            raise ValueError("; ".join(problems))
        threading.Thread(target=self._watch, name="rollout", daemon=True).start()

    def tell(self, config: dict[str, Any]) -> None:
        """Keeps it for the gateways, which ask."""
        self._config = config

    async def next_config(self, known: str | None) -> dict[str, Any]:
        """What there is: once it is something else than `known` (a fingerprint), or after a few seconds in any case."""
        until = time.monotonic() + ASK_FOR_S
        while fingerprint(self._config) == known and time.monotonic() < until:
            await asyncio.sleep(LOOK_EVERY_S)
        return self._config

    def _watch(self) -> None:
        while not self._ended.wait(self.settings.watch_every_s):
            try:
                lines = self.reconcile()
            except (ValueError, OSError, RuntimeError, RayError, RayServeException) as error:
                lines = [f"everything stays as it is: {error}"]
            for line in lines:
                logging.getLogger("ray.serve").warning(line)

    def __del__(self) -> None:
        self._ended.set()


class Ingress:
    """The gateway behind Serve's proxy. It is healthy once it knows what there is to serve."""

    async def __init__(self, rollout: DeploymentHandle):  # type: ignore[misc]  # Serve awaits it
        self._following: asyncio.Task[None] | None = None
        self.gateway = Gateway()
        self._rollout, self._known = rollout, ""
        await self._ask()
        self._following = asyncio.create_task(self._follow())

    def __serve_build_asgi_app__(self) -> Door:
        return make_app(self.gateway)

    def check_health(self) -> None:
        """Raises once changes are not followed any more: Serve then starts another."""
        if self._following and self._following.done():
            raise RuntimeError(f"the gateway follows the rollout no more: {self._following}")

    async def __del__(self) -> None:
        if self._following:
            self._following.cancel()

    async def _ask(self) -> None:
        config = await self._rollout.next_config.remote(self._known)
        if fingerprint(config) != self._known:
            self.gateway.reconfigure(config)
            self._known = fingerprint(config)

    async def _follow(self) -> None:
        """While the rollout restarts, what is served goes on being served."""
        while True:
            try:
                await self._ask()
            except (RayError, RayServeException):
                await asyncio.sleep(ASK_FOR_S)
