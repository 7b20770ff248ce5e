"""Routes and shadows in a gateway: which requests are watched, which go to a shadow too, and who is told."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Coroutine

from ray.serve.handle import DeploymentHandle

from shoal_services.serving.engine.generation import Call, Piece
from shoal_services.serving.http.record import Comparison, Outcome, RequestRecord, count_equal
from shoal_services.serving.settings import ShadowSettings

# A shadow must harm nobody: what it cannot take at once, it does not get.
MAX_SHADOWS_AT_ONCE = 2
TELL_EVERY_S = 2.0


class Experiments:
    """What a gateway observes. Without `observer` nothing is."""

    def __init__(
        self,
        shadows: dict[str, ShadowSettings],
        find_handle: Callable[[str], DeploymentHandle],
        observer: DeploymentHandle | None,
    ):
        self.shadows, self.find_handle, self.observer = shadows, find_handle, observer
        self._untold: list[Outcome | Comparison] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_shadows = 0

    def begin(self, variant: str, route: str | None, calls: list[Call]) -> RequestRecord:
        """The record of a request that is about to go to `variant`, chosen by `route` if there was one."""
        return RequestRecord(variant, route, calls, self._end)

    def _end(self, record: RequestRecord) -> None:
        if self.observer is None:
            return
        if record.route is not None and record.result is not None:
            num_tokens = sum(map(len, record.tokens.values()))
            self._tell(
                Outcome(record.route, record.variant, record.result, num_tokens, record.first_token_ms, record.latency_ms)
            )
        shadow = self.shadows.get(record.variant)
        if shadow and self._wants(record) and random.random() < shadow.share:
            self._num_shadows += 1
            self._start(self._compare(record, shadow.variant))

    def _wants(self, record: RequestRecord) -> bool:
        """Whether a shadow should say the same: one text, answered, without chance in it."""
        sampling = record.calls[0].sampling
        determined = sampling.temperature == 0 or sampling.seed is not None
        free = self._num_shadows < MAX_SHADOWS_AT_ONCE
        return record.result == "answered" and len(record.calls) == 1 and determined and free

    async def _compare(self, record: RequestRecord, shadow: str) -> None:
        ours, theirs, latency_ms = record.tokens[0], list[int](), None
        try:
            started = time.perf_counter()
            piece: Piece = await self.find_handle(shadow).generate.remote(record.calls[0])
            theirs, latency_ms = [token.id for token in piece.delta.tokens], (time.perf_counter() - started) * 1e3
        except Exception:
            pass  # whatever a shadow does, it shows in the counts alone
        finally:
            self._num_shadows -= 1
        assert record.latency_ms is not None
        length, equal = max(len(ours), len(theirs)), count_equal(ours, theirs)
        self._tell(Comparison(record.variant, shadow, length, equal, record.latency_ms, latency_ms))

    def _tell(self, what: Outcome | Comparison) -> None:
        """Tells the observer, of several at once."""
        self._untold.append(what)
        if len(self._untold) == 1:
            self._start(self._tell_soon())

    async def _tell_soon(self) -> None:
        await asyncio.sleep(TELL_EVERY_S)
        told, self._untold = self._untold, []
        assert self.observer is not None
        with contextlib.suppress(Exception):  # an observer that is down costs what it would have counted
            await self.observer.observe.remote(told)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)
