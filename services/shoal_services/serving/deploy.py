"""The story of serving: resolve models → a Serve application for each variant → the listening gateway, told where they are.

A variant's application carries its version in its name. Another version is another application beside the first: the
gateway changes over once the new one is healthy, and the old one stays a while, so that going back is instant. No
request sees the change.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import ray
from ray import serve
from ray.serve.schema import LoggingConfig
from shoal.value import fingerprint

from shoal_services.cluster.connect import connect
from shoal_services.serving.application import (
    REFUSED_AT_ONCE,
    VARIANT,
    find_problem,
    is_running,
    make_application,
    make_safe,
)
from shoal_services.serving.http.keys import require_keys
from shoal_services.serving.http.server import GatewayServer, find_grace_s, require_free_port
from shoal_services.serving.observer import Observer
from shoal_services.serving.replica.model_cache import make_model_cache
from shoal_services.serving.settings import ServeSettings
from shoal_services.serving.sources import find_version
from shoal_services.tracking.registry import REGISTRY, find_registered

GATEWAY, OBSERVER, MODEL_CACHE = "gateway", "observer", "model_cache"
CHECK_S = 120
# Until Serve's controller has noticed that a replica has ended.
STOP_S = 5
CODE_VERSION = "1"


class Served(NamedTuple):
    """The application (or model id on the model cache) that answers for a variant, and where its weights came from."""

    app: str
    place: str
    model_cache: str | None = None


class Fleet:
    """The variants that are deployed, brought in line with the settings again and again. A subclass tells the gateway."""

    def __init__(self, settings: ServeSettings):
        self.settings = settings
        self.served: dict[str, Served] = {}
        self._idle_since: dict[str, float] = {}
        self._broken: set[str] = set()
        self._said: set[str] = set()
        self._observed = False
        self._shelved: dict[str, dict[str, Any]] = {}
        self._locked: str | None = None

    def require_keys(self) -> None:
        """Raises ValueError if there should be keys to begin with, and are none."""
        if self.settings.keys is not None:
            require_keys(self.settings.keys)

    def tell(self, config: dict[str, Any]) -> None:
        """Lets the gateways know what there is: the argument of `Gateway.reconfigure`."""
        raise NotImplementedError

    def reconcile(self, settings: ServeSettings | None = None) -> list[str]:
        """Rolls out what has changed: settings, aliases of the registry, folders. Returns what was done, in words.

        A version that does not start, or a registry that does not answer, leaves what is served as it is.
        """
        self.settings = settings or self.settings
        done = []
        for name, variant in self.settings.variants.items():
            try:
                place = resolve(variant.model, self.settings.tracking_uri)
                if self._serve(name, place):
                    done.append(f"{name} is now {place}")
            except (ValueError, RuntimeError, OSError) as error:
                message = f"{name} stays as it is: {(str(error).splitlines() or ['?'])[0]}"
                if message not in self._said:
                    done.append(message)
                self._said.add(message)
        for name in set(self.served) - set(self.settings.variants):
            del self.served[name]
            done.append(f"{name} is not served any more")
        locked = self._locked
        self.tell(self.describe())
        if self._locked not in (None, locked):
            done.append(f"nobody gets in: {self._locked}")
        self._retire()
        return done

    def _serve(self, name: str, place: str) -> bool:
        """Makes sure that variant `name` is served from `place`; False if it was already."""
        variant = self.settings.variants[name]
        version = find_version(place, name, variant.model_dump(), self.settings.limits.model_dump())
        served = Served(f"{make_safe(name)}-{version}", place, MODEL_CACHE if variant.shared else None)
        if self.served.get(name) == served or served.app in self._broken:
            return False
        if variant.shared:
            self._put_into_cache(served.app, {"name": name, "place": place, "variant": variant.model_dump()})
        elif not is_running(served.app):
            try:
                serve.run(make_application(name, place, self.settings), name=served.app, route_prefix=None)
            except RuntimeError as error:
                self._broken.add(served.app)
                problem = find_problem(served.app) or str(error)
                serve.delete(served.app)
                raise ValueError(f"variant {name!r} does not start from {place!r}: {problem}") from error
        self.served[name] = served
        return True

    def _put_into_cache(self, model_id: str, model: dict[str, Any]) -> None:
        """Lets the model cache know of a model. Those before it stay: requests, and the way back, may ask for them."""
        if model_id in self._shelved:
            return
        self._shelved[model_id] = model
        settings, limits = self.settings.model_cache, self.settings.limits
        deployment = cast(serve.Deployment, serve.deployment(make_model_cache(settings.max_loaded))).options(
            _internal=True, version=fingerprint([CODE_VERSION, settings.model_dump(), limits.model_dump()]),
            name=MODEL_CACHE, num_replicas=settings.replicas, user_config=self._shelved,
            max_ongoing_requests=settings.max_loaded * (limits.max_batch_size + limits.max_queued) + REFUSED_AT_ONCE,
            max_queued_requests=max(1, limits.max_queued), health_check_period_s=1,
            graceful_shutdown_timeout_s=find_grace_s(limits),
            ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        )  # fmt: skip
        serve.run(deployment.bind(limits.model_dump()), name=MODEL_CACHE, route_prefix=None)
        try:
            serve.get_app_handle(MODEL_CACHE).check.remote(model_id).result(timeout_s=CHECK_S)
        except ValueError as error:
            self._broken.add(model_id)
            del self._shelved[model_id]
            raise ValueError(f"variant {model['name']!r} cannot be loaded from {model['place']!r}: {error}") from error

    def _retire(self) -> None:
        """Ends applications that no variant has used for `rollback_s`; their requests finish first."""
        in_use, now = {served.app for served in self.served.values()}, time.monotonic()
        deployed = serve.status().applications
        for app in {name for name, status in deployed.items() if set(status.deployments) == {VARIANT}} - in_use:
            if now - self._idle_since.setdefault(app, now) > self.settings.rollback_s:
                serve.delete(app, _blocking=False)
                del self._idle_since[app]
        for app in in_use & set(self._idle_since):
            del self._idle_since[app]

    def _here(self) -> dict[str, Any]:
        """Options of an actor that belongs on this machine: it listens on its port, or writes to its files."""
        return {"num_cpus": 0, "resources": {f"node:{ray.util.get_node_ip_address()}": 0.001}}

    def _observe(self) -> str | None:
        """Deploys the observer where there is something to observe; its application's name."""
        settings = self.settings
        if not (settings.routes or settings.shadows):
            return None
        if not self._observed:
            arguments = str(settings.results.resolve()), settings.tracking_uri, settings.experiment, settings.report_every_s
            deployment = cast(serve.Deployment, serve.deployment(Observer)).options(ray_actor_options=self._here())
            session = time.strftime("%Y-%m-%d %H:%M:%S")
            serve.run(deployment.bind(*arguments, session), name=OBSERVER, route_prefix=None)
            self._observed = True
        return OBSERVER

    def describe(self) -> dict[str, Any]:
        """What the gateway has to know, of what is served by now."""
        settings, served = self.settings, self.served
        variants = {
            name: {
                "app": one.app,
                "model_cache": one.model_cache,
                "sleeps": settings.variants[name].min_replicas == 0,
                **settings.variants[name].model_dump(include={"perplexity", "num_parameters"}),
            }
            for name, one in served.items()
        }
        routes = {
            route: {name: weight for name, weight in weights.items() if name in served}
            for route, weights in settings.routes.items()
        }
        return {
            "variants": variants,
            "routes": {route: weights for route, weights in routes.items() if any(weights.values())},
            "shadows": {n: s.model_dump() for n, s in settings.shadows.items() if {n, s.variant} <= set(served)},
            "observer": self._observe(),
            "limits": settings.limits.model_dump(),
            "keys": self._find_keys(),
            "origins": settings.origins,
            "local_only": settings.local_only,
        }

    def _find_keys(self) -> list[dict[str, Any]] | None:
        """The keys as they are now. What the file does not hold opens nothing, also where it is gone or damaged."""
        self._locked = None
        if self.settings.keys is None:
            return None
        try:
            return [key.model_dump() for key in require_keys(self.settings.keys)]
        except ValueError as error:
            self._locked = str(error)
            return []


class Endpoint(Fleet):
    """A fleet with a gateway that listens on a port of this machine."""

    def __init__(self, settings: ServeSettings):
        super().__init__(settings)
        self._started_ray = False
        self._told: dict[str, Any] | None = None

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
            self._serve(name, place)
        self.tell(self.describe())
        listen("start variants", len(places), len(places))

    def reconcile(self, settings: ServeSettings | None = None) -> list[str]:
        """As `Fleet.reconcile`. Raises ValueError for settings that are wrong where it listens, which stays what it is."""
        here = {name: getattr(self.settings, name) for name in ("host", "port", "address")}
        if settings is not None and any(getattr(settings, name) != value for name, value in here.items()):
            settings = ServeSettings.model_validate(settings.model_dump() | here)
        return super().reconcile(settings)

    def tell(self, config: dict[str, Any]) -> None:
        """Deploys the gateway, or tells it what changed: with an equal version Serve only calls `reconfigure`."""
        if config == self._told:
            return
        deployment = cast(serve.Deployment, serve.deployment(GatewayServer)).options(
            # Without a version of ours, Serve makes one up and starts new replicas at every call.
            _internal=True, version=CODE_VERSION, name=GATEWAY, num_replicas=self.settings.gateways, user_config=config,
            ray_actor_options=self._here(), health_check_period_s=1,
            graceful_shutdown_timeout_s=find_grace_s(self.settings.limits),
        )  # fmt: skip
        serve.run(deployment.bind(self.settings.host, self.settings.port), name=GATEWAY, route_prefix=None)
        self._told = config

    def stop(self) -> None:
        """Lets running requests finish, then ends what was deployed; Serve if nobody else uses it; Ray if started here.

        The gateway goes first, which waits for its answers; `serve.shutdown` alone would wait for half a minute at most.
        """
        is_local = self._started_ray and self.settings.address is None
        others = {OBSERVER, MODEL_CACHE, *(served.app for served in self.served.values()), *self._idle_since}
        with contextlib.suppress(KeyboardInterrupt):  # a second one: at once
            if ray.is_initialized():
                self._end_applications({GATEWAY})
                self._end_applications(others)
            # A local Ray takes Serve with it, and without the errors that Serve's controller leaves in its wake.
            if ray.is_initialized() and not is_local and not serve.status().applications:
                serve.shutdown()
        if self._started_ray:
            ray.shutdown()

    def _end_applications(self, names: set[str]) -> None:
        """Returns once they have ended, or had their time."""
        until = time.monotonic() + find_grace_s(self.settings.limits) + STOP_S
        for name in names & set(serve.status().applications):
            serve.delete(name, _blocking=False)
        while names & set(serve.status().applications) and time.monotonic() < until:
            time.sleep(0.2)


def resolve(model: str, tracking_uri: str | None) -> str:
    """Where a model's weights are. Raises ValueError for a registry name that leads nowhere."""
    return find_registered(model, tracking_uri) if model.startswith(REGISTRY) else model
