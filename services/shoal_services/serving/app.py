"""The fleet as a declarative Serve application, its gateway behind Serve's own HTTP proxies: what a RayService deploys.

`import_path: shoal_services.serving.app:build`, with the settings of `serve.yaml` as `args`. The same fleet and the same
gateway as in `shoal serve`; but here nobody stays to watch: a small deployment, the rollout, keeps both in line from
within the cluster. Serve's proxies lead to the gateway, so that this application has no route: `route_prefix: null`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any, cast

from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from shoal_services.complaints import explain_validation
from shoal_services.serving.fleet import Fleet
from shoal_services.serving.settings import ServeSettings

# Settings of `shoal serve` that have no meaning here: Serve's proxies listen, on the cluster that runs the application.
NOT_HERE = ("host", "port", "address")


def build(args: dict[str, Any]) -> serve.Application:
    """The application for these settings. Raises ValueError for settings that are wrong, or have no meaning here."""
    settings = read_settings(args)
    rollout = cast(serve.Deployment, serve.deployment(Rollout)).options(
        name="rollout", num_replicas=1, ray_actor_options={"num_cpus": 0}
    )
    return rollout.bind(settings.model_dump(mode="json"))


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
        self._application = serve.get_replica_context().app_name
        super().__init__(ServeSettings.model_validate(settings), proxied=True)
        self.require_keys()
        problems = self.reconcile()
        if not self.served:
            raise ValueError("; ".join(problems))
        threading.Thread(target=self._watch, name="rollout", daemon=True).start()

    def _watch(self) -> None:
        while not self._ended.wait(self.settings.watch_every_s):
            try:
                lines = self.reconcile()
            except (ValueError, OSError, RuntimeError, RayError, RayServeException) as error:
                lines = [f"everything stays as it is: {error}"]
            for line in lines:
                logging.getLogger("ray.serve").warning(line)

    def __del__(self) -> None:
        """Where the application itself is deleted, what it has deployed goes too; another rollout would find it."""
        self._ended.set()
        with contextlib.suppress(RayError, RayServeException):  # Serve as a whole has ended
            status = serve.status().applications.get(self._application)
            if status is not None and status.status == ApplicationStatus.DELETING:
                self.end(wait_s=0)
