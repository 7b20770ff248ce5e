"""Whether each variant can answer, as Serve's controller sees it: what `/health` says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve.schema import DeploymentStatusOverview, ServeStatus

# A variant that wakes answers once it is up; requests wait for it.
HEALTHY = {"ready", "asleep", "waking"}
FRESH_S = 1.0
ANSWERS_WITHIN_S = 5.0


class Health:
    """The state of every variant, asked for once a second at most, however many probes come."""

    def __init__(self, find_cards: Callable[[], dict[str, dict[str, Any]]]):
        self._find_cards = find_cards
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[dict[str, str]] | None = None

    async def find_states(self) -> dict[str, str]:
        """Variant → `ready`, `asleep`, `waking`, `starting`, `down`, `gone`, or `unknown` where Serve does not say."""
        if self._asking is None or (self._asking.done() and time.monotonic() - self._asked_at > FRESH_S):
            self._asked_at = time.monotonic()
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> dict[str, str]:
        try:
            status = await asyncio.wait_for(asyncio.to_thread(serve.status), ANSWERS_WITHIN_S)
        except Exception:
            return dict.fromkeys(self._find_cards(), "unknown")
        return {name: read_state(status, card) for name, card in self._find_cards().items()}


def read_state(status: ServeStatus, card: dict[str, Any]) -> str:
    """The state of one variant by its card. Of several replicas one that runs is enough."""
    application = status.applications.get(card["model_cache"] or card["app"])
    if application is None or not application.deployments:
        return "gone"
    (deployment,) = application.deployments.values()
    return _read_deployment(deployment, sleeps=card["sleeps"])


def _read_deployment(deployment: DeploymentStatusOverview, *, sleeps: bool) -> str:
    # Serve gives the names of states, where its annotation says the states themselves.
    replicas = {str(getattr(state, "value", state)): count for state, count in deployment.replica_states.items()}
    if replicas.get("RUNNING"):
        return "ready"
    if deployment.status.value in ("UNHEALTHY", "DEPLOY_FAILED"):
        return "down"
    if not sleeps:
        return "starting"
    return "waking" if replicas else "asleep"
