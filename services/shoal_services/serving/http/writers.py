"""What the endpoint answers, in the shapes of OpenAI's completion interfaces."""

from __future__ import annotations

import codecs
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from shoal_services.serving.engine.generation import Delta, Piece, Token

# JSON knows no infinity; a token that cannot be has this log probability, as in vLLM.
LOWEST_LOGPROB = -9999.0


class Offsets:
    """Where the tokens of one text begin, in characters. A token that finishes a character begins where that does."""

    def __init__(self) -> None:
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def take(self, token: Token) -> int:
        """The offset of the text's next token."""
        offset = self._offset
        self._offset += len(self._characters.decode(token.spelled or b""))
        return offset


class CompletionWriter:
    """Deltas of choices → chunks of /v1/completions; whole answers are the sum of their chunks.

    Each prompt has `num_choices` choices, one after another.
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, num_choices: int):
        self.base = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.num_choices = num_choices
        self._offsets: dict[int, Offsets] = defaultdict(Offsets)

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        """One streamed chunk."""
        return {**self.base, "object": self.chunk_kind, "choices": [self._choice(index, delta)]}

    def answer(self, pieces: list[Piece]) -> dict[str, Any]:
        """The whole answer; one piece a choice."""
        choices = [self._choice(index, piece.delta) for index, piece in enumerate(pieces)]
        prompt_tokens = {index: piece.num_prompt_tokens for index, piece in enumerate(pieces)}
        usage = self._count(prompt_tokens, sum(len(piece.delta.tokens) for piece in pieces))
        return {**self.base, "object": self.kind, "choices": choices, "usage": usage}

    def usage_chunk(self, prompt_tokens: Mapping[int, int], completion_tokens: int) -> dict[str, Any]:
        """The last chunk of a stream that was asked for its usage; `prompt_tokens` are those of each choice's prompt."""
        usage = self._count(prompt_tokens, completion_tokens)
        return {**self.base, "object": self.chunk_kind, "choices": [], "usage": usage}

    def _count(self, prompt_tokens: Mapping[int, int], completion_tokens: int) -> dict[str, int]:
        """Token counts, each prompt counted once."""
        read = sum(number for index, number in prompt_tokens.items() if index % self.num_choices == 0)
        return {
            "prompt_tokens": read, "completion_tokens": completion_tokens, "total_tokens": read + completion_tokens,
        }  # fmt: skip

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        tokens = [*delta.prompt_tokens, *delta.tokens]
        logprobs = self._logprobs(index, tokens) if any(token.logprob is not None for token in tokens) else None
        return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _logprobs(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_find_logprob(token) for token in tokens],
            "top_logprobs": [{top.text: _find_logprob(top) for top in token.top} or None for token in tokens],
            "text_offset": [self._offsets[index].take(token) for token in tokens],
        }


class ChatWriter(CompletionWriter):
    """Deltas of choices → chunks of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first_chunk(self, index: int) -> dict[str, Any]:
        """The chunk before a choice's text: who speaks."""
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return {**self.base, "object": self.chunk_kind, "choices": [choice]}

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        """One streamed chunk."""
        choice = self._choice(index, delta)
        del choice["message"]
        choice["delta"] = {"content": delta.text} if delta.text else {}
        return {**self.base, "object": self.chunk_kind, "choices": [choice]}

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        scored = [token for token in delta.tokens if token.logprob is not None]
        return {
            "index": index,
            "message": {"role": "assistant", "content": delta.text},
            "logprobs": {"content": [_describe(token) for token in scored]} if scored else None,
            "finish_reason": delta.finish_reason,
        }


def _describe(token: Token) -> dict[str, Any]:
    def entry(one: Token) -> dict[str, Any]:
        return {
            "token": one.text,
            "logprob": _find_logprob(one),
            "bytes": None if one.spelled is None else list(one.spelled),
        }

    return {**entry(token), "top_logprobs": [entry(top) for top in token.top]}


def _find_logprob(token: Token) -> float | None:
    return None if token.logprob is None else max(token.logprob, LOWEST_LOGPROB)
