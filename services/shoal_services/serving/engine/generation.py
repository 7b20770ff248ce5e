"""The values of token generation: what a request asks for, and what it gets step by step. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]
# A text, token ids, or the messages of a chat.
Prompt = str | tuple[int, ...] | tuple[dict[str, str], ...]


class QueueFull(Exception):
    """As many requests run and wait as the limits allow."""


class EngineClosed(Exception):
    """The engine takes no more requests."""


class ContextExceeded(ValueError):
    """Prompt and answer are longer than the model's context."""

    code = "context_length_exceeded"


class RequestFailed(Exception):
    """The engine could not go on with this one request; the others are none the worse."""


class OutOfMemory(RequestFailed):
    """There was no memory for this request at that time."""


class EngineFailed(Exception):
    """The engine has ended, and answers nothing any more."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked. Temperature 0 takes the most likely token; `top_k` 0 and `top_p` 1 keep all tokens.

    The penalties are subtracted from the logits of tokens generated before: `presence_penalty` once,
    `frequency_penalty` for each time. `num_logprobs` is how many likely tokens to report beside each picked one (None:
    not even the picked one's). Equal seeds give equal tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    num_logprobs: int | None = None


@dataclass(frozen=True)
class Generation:
    """One text to generate from a prompt of tokens."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    echo: bool = False

    def check_length(self, max_context: int) -> None:
        """Raises ValueError if there is no prompt, `ContextExceeded` if prompt and answer exceed the context."""
        if not self.prompt_ids:
            raise ValueError("the prompt has no tokens; give it some text")
        if self.num_tokens > max_context:
            raise ContextExceeded(
                f"this model's maximum context length is {max_context} tokens; {len(self.prompt_ids)} in the prompt and "
                f"{self.max_tokens} to generate are {self.num_tokens}; shorten the prompt or lower max_tokens"
            )

    def check_tokens(self, num_embeddings: int) -> None:
        """Raises ValueError for tokens that the model has no embedding of."""
        if outside := [token for token in self.prompt_ids if not 0 <= token < num_embeddings]:
            raise ValueError(f"the model has no tokens {outside[:5]}: it has embeddings of {num_embeddings}")

    @property
    def num_tokens(self) -> int:
        """The most tokens that prompt and answer can have together."""
        return len(self.prompt_ids) + self.max_tokens


@dataclass(frozen=True)
class Token:
    """A token: its id, its log probability in nats given those before it (None unless asked for), and the likeliest
    tokens in its place. Where log probabilities are asked for, `text` shows it, and `spelled` are the bytes that it adds to
    the text, of which it may be a part of a character (None for special tokens, which add nothing)."""

    id: int
    text: str = ""
    logprob: float | None = None
    top: tuple[Token, ...] = ()
    spelled: bytes | None = None


@dataclass(frozen=True)
class Delta:
    """What was added to a text since the last delta. The last of a generation has a `finish_reason`.

    With `echo`, the first one's `prompt_tokens` are those of the prompt, and its text is the prompt's.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_tokens: tuple[Token, ...] = ()

    @classmethod
    def join(cls, deltas: list[Delta]) -> Delta:
        """One delta that says what all of them say."""
        return cls(
            text="".join(delta.text for delta in deltas),
            tokens=tuple(token for delta in deltas for token in delta.tokens),
            finish_reason=deltas[-1].finish_reason if deltas else None,
            prompt_tokens=tuple(token for delta in deltas for token in delta.prompt_tokens),
        )


@dataclass(frozen=True)
class Call:
    """What the gateway asks of a variant: a generation whose prompt is not in tokens yet.

    `max_tokens` None means as many as the context leaves.
    """

    prompt: Prompt
    max_tokens: int | None
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    echo: bool = False


@dataclass(frozen=True)
class Piece:
    """What a variant answers, piece by piece. Every piece says how many tokens the prompt has."""

    delta: Delta
    num_prompt_tokens: int


@dataclass
class EngineStatistics:
    """Counts since the start, and what is going on now."""

    generated_tokens: int = 0
    requests: int = 0
    waiting: int = 0
    running: int = 0
