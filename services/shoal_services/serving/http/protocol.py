"""The wire format: requests of OpenAI's completion interfaces, checked.

Beyond OpenAI's own: `top_k` and `ignore_eos`, as in vLLM. A parameter that would have to be ignored is refused, unless it
asks for nothing: clients send fields that they know and leave empty.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

from shoal_services.serving.engine.generation import Sampling

MAX_CHOICES = 16
MAX_PROMPTS = 32
# The forms of a value that may be given in several, as a complaint's path names them.
TEXT, TEXTS, TOKENS, TOKEN_LISTS, PARTS = FORMS = ("(text)", "(texts)", "(tokens)", "(token lists)", "(parts)")


def one_of(find_form: Callable[[Any], str | None], says: str) -> Discriminator:
    """Has a complaint speak of the form that was given, and of no other."""
    return Discriminator(find_form, custom_error_type="form", custom_error_message=says)


def _find_prompt_form(value: Any) -> str | None:
    if not isinstance(value, list):
        return TEXT if isinstance(value, str) else None
    first = value[0] if value else ""
    return TEXTS if isinstance(first, str) else TOKEN_LISTS if isinstance(first, list) else TOKENS


class Strict(BaseModel):
    """Unknown parameters are errors, and numbers are numbers. Null stands for what is taken if nothing is said."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    # Parameters of OpenAI's that there are not here, with the values (beside null) by which nothing is asked for.
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {
            name: value
            for name, value in data.items()
            if not (name in cls.neutral and (value is None or value in cls.neutral[name]))
            and not (name in optional and value is None)
        }


class TextPart(Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Stop = Annotated[
    Annotated[StopString, Tag(TEXT)] | Annotated[list[StopString], Field(max_length=4), Tag(TEXTS)],
    one_of(
        lambda value: TEXT if isinstance(value, str) else TEXTS if isinstance(value, list) else None,
        "Input should be a text or a list of texts",
    ),
]
Content = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[TextPart], Tag(PARTS)],
    one_of(
        lambda value: TEXT if isinstance(value, str) else PARTS if isinstance(value, list) else None,
        "Input should be a text or a list of parts",
    ),
]
Prompts = Annotated[
    Annotated[str, Tag(TEXT)]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag(TEXTS)]
    | Annotated[TokenIds, Tag(TOKENS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), Tag(TOKEN_LISTS)],
    one_of(_find_prompt_form, "Input should be a text, a list of texts, token ids, or a list of token ids"),
]


class StreamOptions(Strict):
    """`include_usage`: a last chunk with the token counts."""

    neutral = {"include_obfuscation": (False,)}
    include_usage: bool = False


class Body(Strict):
    """What a client sends."""

    model: str = Field(min_length=1, max_length=500)

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        try:
            json.dumps(data if isinstance(data, dict) else None, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the body holds half a surrogate pair ({error.object[error.start]!r}), which is no character; send both "
                "halves, or the character itself"
            ) from None
        return data


class _Request(Body):
    """What both interfaces have in common."""

    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, description="keep the k likeliest tokens; 0 and -1 keep all")
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: Stop = Field(default_factory=list[str])
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    user: str | None = Field(default=None, max_length=500, description="routes stay with a user")
    ignore_eos: bool = Field(default=False, description="generate on past the end-of-text token")

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options.model_fields_set and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, num_logprobs: int | None, choice: int = 0) -> Sampling:
        """How the tokens of choice number `choice` are picked."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            num_logprobs=num_logprobs,
        )


class CompletionRequest(_Request):
    """POST /v1/completions."""

    neutral = {"logit_bias": ({},), "suffix": ("",)}
    prompt: Prompts
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = None

    @model_validator(mode="after")
    def _all_are_returned(self) -> Self:
        if self.best_of not in (None, 1, self.n):
            raise ValueError(f"best_of {self.best_of} is not supported; all of the n = {self.n} are returned")
        return self

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts as texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in cast(list[str | list[int]], self.prompt)]


class Message(Strict):
    """One turn of a chat."""

    # As clients send answers back that they got, from here or from servers of the same interface.
    neutral = {
        "refusal": ("",), "annotations": ([],), "audio": (), "tool_calls": ([],), "function_call": (), "reasoning": ("",),
        "reasoning_content": ("",),
    }  # fmt: skip
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _assistants_may_say_nothing(cls, data: Any) -> Any:
        silent = isinstance(data, dict) and data.get("role") == "assistant" and data.get("content", "") is None
        return {**data, "content": ""} if silent else data

    def as_template_input(self) -> dict[str, str]:
        """What chat templates take."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        name = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **name}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    neutral = {
        "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
        "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "logit_bias": ({},), "metadata": ({},),
        "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (), "moderation": (),
        "store": (False,), "service_tier": ("auto", "default"), "reasoning_effort": ("none",), "verbosity": ("medium",),
        "prompt_cache_key": ("",), "prompt_cache_options": ({},), "prompt_cache_retention": (), "safety_identifier": ("",),
    }  # fmt: skip
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @model_validator(mode="after")
    def _parameters_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens say different things; give one of them")
        return self

    @property
    def num_new(self) -> int | None:
        """The most tokens of the answer."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(Body):
    """POST /tokenize."""

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
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
