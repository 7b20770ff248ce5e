"""The calls of one HTTP request, and what comes back of them piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from typing import Any, cast

from ray.serve.handle import DeploymentHandle, DeploymentResponse

from shoal_services.serving.engine.generation import Delta, Piece
from shoal_services.serving.http.failures import BrokenOff
from shoal_services.serving.http.record import RequestRecord
from shoal_services.serving.replica.channel import Inbox

# A call has returned: its last piece is on the way, unless a message was lost.
LAST_PIECE_S = 5.0


class AnswerStream:
    """The pieces of several calls to one variant, in the order in which they come.

    Leaving it early cancels what is not finished, which frees the rows.
    """

    def __init__(self, inbox: Inbox, handle: DeploymentHandle, record: RequestRecord, *, timeout_s: float):
        self.num_calls, self.timeout_s = len(record.calls), timeout_s
        self._inbox, self._record, self._failed = inbox, record, False
        self._queue: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue()
        self._backlog: list[tuple[int, Piece]] = []
        self._open = set(range(self.num_calls))
        self._replies = [inbox.open(functools.partial(self._hear, index)) for index in range(self.num_calls)]
        self._responses = [
            cast(DeploymentResponse[Any], handle.generate.remote(call, reply))
            for call, reply in zip(record.calls, self._replies, strict=True)
        ]
        self._watches = [asyncio.create_task(self._watch(i, r)) for i, r in enumerate(self._responses)]

    async def take_firsts(self) -> None:
        """Waits for the first piece of every call; they stay in the answer. Raises what a call raises, and TimeoutError."""
        seen: set[int] = set()
        while len(seen) < self.num_calls:
            index, piece = await self._take()
            seen.add(index)
            self._backlog.append((index, piece))

    async def collect(self) -> list[Piece]:
        """The whole answer of every call, put together from its pieces. Raises what a call raises."""
        pieces: list[list[Piece]] = [[] for _ in range(self.num_calls)]
        async for index, piece in self:
            pieces[index].append(piece)
        return [Piece(Delta.join([one.delta for one in own]), own[-1].num_prompt_tokens) for own in pieces]

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Call numbers and pieces until all calls have finished. Raises TimeoutError if nothing comes for `timeout_s`."""
        while self._open:
            if self._backlog:
                index, piece = self._backlog.pop(0)
            else:
                index, piece = await self._take()
            if piece.delta.finish_reason is not None:
                self._open.discard(index)
            yield index, piece

    def fail(self, error: Exception) -> None:
        """Lets whoever waits for more have this error instead."""
        self._queue.put_nowait((0, error))

    def close(self) -> None:
        """Ends the calls that have not finished, and hears no more of them."""
        self._record.end("failed" if self._failed else "left" if self._open else "answered")
        for reply in self._replies:
            self._inbox.close(reply)
        for index in self._open:
            self._watches[index].cancel()
            cancel(self._responses[index])

    def _hear(self, index: int, piece: Piece) -> None:
        self._queue.put_nowait((index, piece))

    async def _take(self) -> tuple[int, Piece]:
        try:
            async with asyncio.timeout(self.timeout_s):
                index, item = await self._queue.get()
        except TimeoutError as error:
            self._failed = True
            raise TimeoutError(f"no token came for {self.timeout_s:g} s, the endpoint's limit; try again later") from error
        if isinstance(item, BaseException):
            self._failed = True
            raise item
        self._record.hear(index, item)
        return index, item

    async def _watch(self, index: int, response: DeploymentResponse[Any]) -> None:
        try:
            await response
            if index in self._open:
                await asyncio.sleep(LAST_PIECE_S)
                self._queue.put_nowait((index, BrokenOff("the answer's last piece did not arrive")))
        except Exception as error:
            self._queue.put_nowait((index, error))


def cancel(response: DeploymentResponse[Any]) -> None:
    """Ends a call, which frees its row; nothing happens to one that has ended or was refused."""
    with contextlib.suppress(Exception):  # to cancel a call that Serve refused raises what it was refused with
        response.cancel()
