"""The wire format: requests of OpenAI's completion interfaces, checked, and the answers' shapes.

Beyond OpenAI's own: `top_k` and `ignore_eos`, as in vLLM. A parameter that would have to be ignored is refused.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from shoal_services.serving.generation import Delta, Sampling, Token

MAX_CHOICES = 16
MAX_PROMPTS = 32

TokenId = Annotated[int, Field(ge=0)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Strict(BaseModel):
    """Unknown parameters are errors, and numbers are numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """`include_usage`: a last chunk with the token counts."""

    include_usage: bool = False


class _Request(Strict):
    """What both interfaces have in common."""

    model: str = Field(min_length=1, max_length=500)
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="keep the k likeliest tokens; 0 keeps all")
    n: int | None = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    user: str | None = Field(default=None, max_length=500, description="routes stay with a user")
    ignore_eos: bool = Field(default=False, description="generate on past the end-of-text token")

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, however they were given."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, num_logprobs: int | None, choice: int = 0) -> Sampling:
        """How the tokens of choice number `choice` are picked."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=None if self.seed is None else self.seed + choice,
            num_logprobs=num_logprobs,
        )


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = False
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts as texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in cast(list[str | list[int]], self.prompt)]


class TextPart(Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def as_template_input(self) -> dict[str, str]:
        """What chat templates take."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class TokenizeRequest(Strict):
    """POST /tokenize."""

    model: str = Field(min_length=1)
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        return self


def make_error(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def make_id(prefix: str) -> str:
    """A fresh id of an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"


def make_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts of one answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class CompletionWriter:
    """Deltas of choices → chunks of /v1/completions; whole answers are the sum of their chunks."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, num_choices: int):
        self.base = {"id": make_id(self.prefix), "created": int(time.time()), "model": model}
        self.offsets = [0] * num_choices

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        """One streamed chunk."""
        return {**self.base, "object": self.chunk_kind, "choices": [self._choice(index, delta)]}

    def answer(self, deltas: list[Delta], usage: dict[str, int]) -> dict[str, Any]:
        """The whole answer; one delta a choice."""
        choices = [self._choice(index, delta) for index, delta in enumerate(deltas)]
        return {**self.base, "object": self.kind, "choices": choices, "usage": usage}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk of a stream that was asked for its usage."""
        return {**self.base, "object": self.chunk_kind, "choices": [], "usage": usage}

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        tokens = [*delta.prompt_tokens, *delta.tokens]
        logprobs = self._logprobs(index, tokens) if any(token.logprob is not None for token in tokens) else None
        return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _logprobs(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{top.text: top.logprob for top in token.top} or None for token in tokens],
            "text_offset": offsets,
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
        return {"token": one.text, "logprob": one.logprob, "bytes": list(one.text.encode())}

    return {**entry(token), "top_logprobs": [entry(top) for top in token.top]}
