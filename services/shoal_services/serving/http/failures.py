"""What a client is told of an answer that failed: a status and one line, never what may name files of the server."""

from __future__ import annotations

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException

from shoal_services.serving.engine.generation import EngineFailed, OutOfMemory, QueueFull, RequestFailed


class VariantDown(Exception):
    """A variant has no replica that answers."""


class BrokenOff(Exception):
    """An answer whose rest will not come."""


def find_cause(error: BaseException) -> BaseException:
    """What a replica raised, which comes with Ray's error around it."""
    return getattr(error, "cause", None) or error


def describe_failure(error: BaseException) -> tuple[int, str]:
    """The HTTP status and the words."""
    cause = find_cause(error)
    statuses = {
        QueueFull: 429, TimeoutError: 504, VariantDown: 503, BrokenOff: 503, OutOfMemory: 503, RequestFailed: 500,
        ValueError: 400,
    }  # fmt: skip
    for kind, status in statuses.items():
        if isinstance(cause, kind):
            return status, (str(cause).splitlines() or [type(cause).__name__])[0]
    if isinstance(error, BackPressureError):
        return 429, "the variant's queue is full; try again in a moment"
    if isinstance(error, RayActorError):
        return 503, "the replica that was answering has died; try again in a moment"
    if isinstance(cause, (EngineFailed, RayServeException)):
        return 503, "the variant cannot answer now; try again in a moment"
    return 500, "the variant failed at this request; its replica's log says why"
