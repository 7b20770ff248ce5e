"""Pieces of several choices → the server-sent events of one answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from shoal_services.serving.http.failures import describe_failure
from shoal_services.serving.http.protocol import make_error
from shoal_services.serving.http.stream import AnswerStream
from shoal_services.serving.http.writers import ChatWriter, CompletionWriter


async def write_events(stream: AnswerStream, writer: CompletionWriter, wants_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of all choices, each as soon as it is there."""
    prompt_tokens: dict[int, int] = {}
    completion_tokens = 0
    try:
        if isinstance(writer, ChatWriter):
            for index in range(stream.num_calls):
                yield _event(writer.first_chunk(index))
        async for index, piece in stream:
            prompt_tokens[index] = piece.num_prompt_tokens
            completion_tokens += len(piece.delta.tokens)
            yield _event(writer.chunk(index, piece.delta))
        if wants_usage:
            yield _event(writer.usage_chunk(prompt_tokens, completion_tokens))
        yield "data: [DONE]\n\n"
    except Exception as error:
        status, message = describe_failure(error)
        yield _event(make_error(status, f"the answer broke off: {message}"))
    finally:
        stream.close()


def _event(payload: dict[str, Any]) -> str:
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"
