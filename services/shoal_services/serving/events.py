"""Pieces of several choices → the server-sent events of one answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from shoal_services.serving.generation import Piece
from shoal_services.serving.protocol import ChatWriter, CompletionWriter, make_error, make_usage

Pieces = AsyncIterator[Piece]


async def write_events(
    firsts: list[Piece], rest: list[Pieces], writer: CompletionWriter, wants_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events of all choices, each as soon as it is there."""
    queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

    async def forward(index: int) -> None:
        try:
            await queue.put((index, firsts[index]))
            async for piece in rest[index]:
                await queue.put((index, piece))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(forward(index)) for index in range(len(firsts))]
    num_open, completion_tokens = len(tasks), 0
    try:
        if isinstance(writer, ChatWriter):
            for index in range(len(firsts)):
                yield _event(writer.first_chunk(index))
        while num_open:
            index, item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                yield _event(make_error(500, f"the answer broke off: {first_line(item)}"))
                return
            else:
                completion_tokens += len(item.delta.tokens)
                yield _event(writer.chunk(index, item.delta))
        if wants_usage:
            yield _event(writer.usage_chunk(make_usage(sum(p.num_prompt_tokens for p in firsts), completion_tokens)))
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()


def _event(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


def count_tokens(pieces: list[Piece]) -> dict[str, int]:
    """The usage of a whole answer."""
    return make_usage(sum(piece.num_prompt_tokens for piece in pieces), sum(len(piece.delta.tokens) for piece in pieces))


def first_line(error: BaseException) -> str:
    """What went wrong in a replica, without the traceback that came with it."""
    cause = getattr(error, "cause", None) or error
    return (str(cause).splitlines() or [type(cause).__name__])[0]
