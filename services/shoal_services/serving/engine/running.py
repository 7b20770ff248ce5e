"""One request on its way through the engine: its tokens become the pieces of its text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from shoal_services.serving.engine.generation import Delta, FinishReason, Generation, OutOfMemory, RequestFailed, Token
from shoal_services.serving.engine.sampling import Sampler
from shoal_services.serving.engine.spelling import Spelling
from shoal_services.serving.engine.text_stream import TextStream


class RunningRequest:
    """A request that waits, and then has a row of the decoder. `emit` hears its pieces, or what ended it."""

    def __init__(self, request: Generation, emit: Callable[[Delta | Exception], object], spelling: Spelling):
        self.request, self.emit = request, emit
        self.stream, self.sampler = TextStream(spelling, request.stop), Sampler(request.sampling)
        self.last_token = -1
        self.num_generated = 0
        self.cancelled = False
        if not request.echo:
            self.stream.follow(request.prompt_ids)

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.request.prompt_ids) + self.num_generated

    def fail(self, error: Exception) -> None:
        """Tells whoever asked, if they are still there."""
        with contextlib.suppress(RuntimeError):  # their event loop is closed
            self.emit(error)

    def read_prompt(self, scored: Sequence[Token]) -> Delta:
        """The prompt as a delta, all its tokens but the first as they were `scored`, if they were."""
        ids, tokens, text = self.request.prompt_ids, [], ""
        for token in [Token(ids[0]), *(scored or map(Token, ids[1:]))]:
            tokens.append(self._label(token))
            text += self.stream.read([token.id])
        return Delta(text=text, prompt_tokens=tuple(tokens))

    def take(self, token: Token, *, ends: bool) -> Delta:
        """What the next token adds to the text, or that it `ends` it."""
        self.num_generated += 1
        self.last_token = token.id
        labelled = self._label(token)
        reason: FinishReason | None = None
        if ends:
            reason, text = "stop", self.stream.flush()
        else:
            text = self.stream.push(token.id)
            if self.stream.stopped:
                reason = "stop"
            elif self.num_generated >= self.request.max_tokens:
                reason, text = "length", text + self.stream.flush()
        return Delta(text=text, tokens=(labelled,), finish_reason=reason)

    def _label(self, token: Token) -> Token:
        """The text's next token with its text, and those beside it with theirs, where log probabilities are wanted."""
        wanted = self.request.sampling.num_logprobs is not None
        return self.stream.spelling.label(token, self.stream.before) if wanted else token


def explain_failure(error: Exception) -> RequestFailed:
    """What is said of an error that came while one request was worked on."""
    if isinstance(error, RequestFailed):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return OutOfMemory("there is no memory for this request now; try again later, or with a shorter prompt")
    return RequestFailed(f"this request failed: {type(error).__name__}: {error}")
