"""The fleet of `shoal serve`: started, reconciled and stopped by a command, its gateway on a port of this machine."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from shoal_services.cluster.connect import connect
from shoal_services.serving.fleet import Fleet, resolve
from shoal_services.serving.http.server import find_grace_s, require_free_port
from shoal_services.serving.settings import ServeSettings

# Until Serve's controller has noticed that a replica has ended.
STOP_S = 5


class Endpoint(Fleet):
    """A fleet on a local Ray, or on a cluster that this machine is part of."""

    def __init__(self, settings: ServeSettings):
        super().__init__(settings)
        self._started_ray = False

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.settings.host}:{self.settings.port}"

    def start(self, listen: Callable[[str, int, int], None]) -> None:
        """Brings everything up; returns when every variant that has a replica is healthy.

        Raises ValueError for a model that cannot be found or served, OSError if the port is taken.
        """
        require_free_port(self.settings.host, self.settings.port)
        self.require_keys()
        places = {name: resolve(v.model, self.settings.tracking_uri) for name, v in self.settings.variants.items()}
        listen("start Ray", 0, 2)
        self._started_ray = not ray.is_initialized()
        connect(self.settings.address)
        listen("start Ray", 1, 2)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        logging_config = LoggingConfig(log_level="WARNING", enable_access_log=False)
        serve.start(proxy_location="Disabled", logging_config=logging_config)
        listen("start Ray", 2, 2)
        for done, (name, place) in enumerate(places.items()):
            listen("start variants", done, len(places))
            self.serve_variant(name, place)
        self.tell_gateway()
        listen("start variants", len(places), len(places))

    def reconcile(self, settings: ServeSettings | None = None) -> list[str]:
        """As `Fleet.reconcile`. Raises ValueError for settings that are wrong where it listens, which stays what it is."""
        here = {name: getattr(self.settings, name) for name in ("host", "port", "address")}
        if settings is not None and any(getattr(settings, name) != value for name, value in here.items()):
            settings = ServeSettings.model_validate(settings.model_dump() | here)
        return super().reconcile(settings)

    def stop(self) -> None:
        """Lets running requests finish, then ends what was deployed; Serve if nobody else uses it; Ray if started here.

        The gateway goes first, which waits for its answers; `serve.shutdown` alone would wait for half a minute at most.
        """
        is_local = self._started_ray and self.settings.address is None
        with contextlib.suppress(KeyboardInterrupt):  # a second one: at once
            if ray.is_initialized():
                self.end(wait_s=find_grace_s(self.settings.limits) + STOP_S)
            # A local Ray takes Serve with it, and without the errors that Serve's controller leaves in its wake.
            if ray.is_initialized() and not is_local and not serve.status().applications:
                serve.shutdown()
        if self._started_ray:
            ray.shutdown()
