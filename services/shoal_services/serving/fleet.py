"""The story of serving: resolve models → a Serve application for each variant → the gateway, told where they are.

A variant's application carries its version in its name. Another version is another application beside the first: the
gateway changes over once the new one is healthy, and the old one stays a while, so that going back is instant. No
request sees the change.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from ray import serve

from shoal_services.serving.deployments import (
    GATEWAY,
    MODEL_CACHE,
    OBSERVER,
    VARIANT,
    find_problem,
    is_running,
    make_gateway,
    make_model_cache,
    make_observer,
    make_safe,
    make_variant,
)
from shoal_services.serving.http.keys import require_keys
from shoal_services.serving.settings import ServeSettings
from shoal_services.serving.sources import find_version
from shoal_services.tracking.registry import REGISTRY, find_registered

CHECK_S = 120


class Served(NamedTuple):
    """The application (or model id on the model cache) that answers for a variant, and where its weights came from."""

    app: str
    place: str
    model_cache: str | None = None


class Fleet:
    """The variants that are deployed, brought in line with the settings again and again, and the gateway before them.

    The gateway listens on a port of this machine, or, if `proxied`, stands behind Serve's own HTTP proxies.
    """

    def __init__(self, settings: ServeSettings, *, proxied: bool = False):
        self.settings, self.proxied = settings, proxied
        self.served: dict[str, Served] = {}
        self._idle_since: dict[str, float] = {}
        self._broken: set[str] = set()
        self._said: set[str] = set()
        self._observed = False
        self._shared: dict[str, dict[str, Any]] = {}
        self._locked: str | None = None
        self._told: dict[str, Any] | None = None

    def require_keys(self) -> None:
        """Raises ValueError if there should be keys to begin with, and are none."""
        if self.settings.keys is not None:
            require_keys(self.settings.keys)

    def reconcile(self, settings: ServeSettings | None = None) -> list[str]:
        """Rolls out what has changed: settings, aliases of the registry, folders. Returns what was done, in words.

        A version that does not start, or a registry that does not answer, leaves what is served as it is.
        """
        self.settings = settings or self.settings
        done = []
        for name, variant in self.settings.variants.items():
            try:
                place = resolve(variant.model, self.settings.tracking_uri)
                if self.serve_variant(name, place):
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
        self.tell_gateway()
        if self._locked not in (None, locked):
            done.append(f"nobody gets in: {self._locked}")
        self._retire()
        return done

    def serve_variant(self, name: str, place: str) -> bool:
        """Makes sure that variant `name` is served from `place`; False if it was already. Raises ValueError if it fails."""
        variant = self.settings.variants[name]
        version = find_version(place, name, variant.model_dump(), self.settings.limits.model_dump())
        served = Served(f"{make_safe(name)}-{version}", place, MODEL_CACHE if variant.shared else None)
        if self.served.get(name) == served or served.app in self._broken:
            return False
        if variant.shared:
            self._put_into_cache(served.app, {"name": name, "place": place, "variant": variant.model_dump()})
        elif not is_running(served.app):
            try:
                serve.run(make_variant(name, place, self.settings), name=served.app, route_prefix=None)
            except RuntimeError as error:
                self._broken.add(served.app)
                problem = find_problem(served.app) or str(error)
                serve.delete(served.app)
                raise ValueError(f"variant {name!r} does not start from {place!r}: {problem}") from error
        self.served[name] = served
        return True

    def _put_into_cache(self, model_id: str, model: dict[str, Any]) -> None:
        """Lets the model cache know of a model. Those before it stay: requests, and the way back, may ask for them."""
        if model_id in self._shared:
            return
        self._shared[model_id] = model
        serve.run(make_model_cache(self._shared, self.settings), name=MODEL_CACHE, route_prefix=None)
        try:
            serve.get_app_handle(MODEL_CACHE).check.remote(model_id).result(timeout_s=CHECK_S)
        except ValueError as error:
            self._broken.add(model_id)
            del self._shared[model_id]
            raise ValueError(f"variant {model['name']!r} cannot be loaded from {model['place']!r}: {error}") from error

    def tell_gateway(self) -> None:
        """Deploys the gateway (and before it the observer, if there is something to observe), or says what has changed."""
        config = self.describe()
        if config["observer"] and not self._observed:
            serve.run(make_observer(self.settings), name=OBSERVER, route_prefix=None)
            self._observed = True
        if config != self._told:
            gateway = make_gateway(config, self.settings, proxied=self.proxied)
            serve.run(gateway, name=GATEWAY, route_prefix="/" if self.proxied else None)
            self._told = config

    def describe(self) -> dict[str, Any]:
        """What the gateway has to know, of what is served by now: the argument of `Gateway.reconfigure`."""
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
            "observer": OBSERVER if settings.routes or settings.shadows else None,
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

    def end(self, *, wait_s: float) -> None:
        """Ends all that was deployed, the gateway first; waits for each up to `wait_s`. Running requests finish before."""
        others = {OBSERVER, MODEL_CACHE, *(served.app for served in self.served.values()), *self._idle_since}
        for names in ({GATEWAY}, others):
            until = time.monotonic() + wait_s
            for name in names & set(serve.status().applications):
                serve.delete(name, _blocking=False)
            while names & set(serve.status().applications) and time.monotonic() < until:
                time.sleep(0.2)


def resolve(model: str, tracking_uri: str | None) -> str:
    """Where a model's weights are. Raises ValueError for a registry name that leads nowhere."""
    return find_registered(model, tracking_uri) if model.startswith(REGISTRY) else model
