"""What a client is told of an answer that failed: a status and one line, never what may name files of the server."""

from __future__ import annotations

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException

from shoal_services.serving.generation import EngineFailed, QueueFull


class VariantDown(Exception):
    """A variant has no replica that answers."""


class BrokenOff(Exception):
    """An answer whose rest will not come."""


def describe_failure(error: BaseException) -> tuple[int, str]:
    """The HTTP status and the words. What a replica raises comes with its error as `cause`."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, (QueueFull, VariantDown, BrokenOff, TimeoutError, ValueError)):
        statuses = {QueueFull: 429, TimeoutError: 504, VariantDown: 503, BrokenOff: 503}
        status = next((status for kind, status in statuses.items() if isinstance(cause, kind)), 400)
        return status, (str(cause).splitlines() or [type(cause).__name__])[0]
    if isinstance(error, BackPressureError):
        return 429, "the variant's queue is full; try again in a moment"
    if isinstance(error, RayActorError):
        return 503, "the replica that was answering has died; try again in a moment"
    if isinstance(cause, (EngineFailed, RayServeException)):
        return 503, "the variant cannot answer now; try again in a moment"
    return 500, "the variant failed at this request; its replica's log says why"
