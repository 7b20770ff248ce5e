"""Token generation behind one interface: requests in from any thread, pieces of text out as they come."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from shoal_services.serving.decoder import BatchedDecoder
from shoal_services.serving.generation import (
    Delta,
    EngineClosed,
    EngineStatistics,
    FinishReason,
    Generation,
    QueueFull,
    Token,
)
from shoal_services.serving.sampling import Sampler, describe_token
from shoal_services.serving.text_stream import TextStream

# Prompt tokens between two steps of those that are running: more, and their texts stall; fewer, and newcomers wait.
PREFILL_TOKENS_PER_STEP = 512


@dataclass(eq=False)
class Running:
    """A request on its way: waiting, then in a row of the decoder."""

    request: Generation
    emit: Callable[[Delta | Exception], object]
    stream: TextStream
    sampler: Sampler
    last_token: int = -1
    num_generated: int = 0
    cancelled: bool = False


class Engine:
    """Continuous batching on a thread of its own: newcomers join between two steps, whoever is done leaves at once.

    The decoder is made on that thread, and nothing else in the process should compute with torch: OpenMP gives every
    thread workers of its own, which wait busily and take the cores from each other (two times slower steps).

    Raises what `make_decoder` raises.
    """

    def __init__(
        self,
        make_decoder: Callable[[], BatchedDecoder],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_context: int,
        max_waiting: int = sys.maxsize,
        after_step: Callable[[], object] = lambda: None,
    ):
        self.tokenizer, self.max_context, self.max_waiting = tokenizer, max_context, max_waiting
        self._after_step = after_step
        self.statistics = EngineStatistics()
        self.failure: Exception | None = None
        self._waiting: deque[Running] = deque()
        self._rows: list[Running] = []
        self._wake = threading.Condition()
        self._closed = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make_decoder,), name="engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self.failure is not None:
            raise self.failure

    async def generate(self, request: Generation, listen: Callable[[Delta], object] = lambda _delta: None) -> Delta:
        """The whole answer; `listen` hears its pieces as they are made, on the engine's thread.

        Cancelling it frees the request's row. Raises ValueError if prompt and new tokens exceed the context, `QueueFull`
        if all rows are taken and `max_waiting` requests wait, `EngineClosed` after `close`.
        """
        if self.failure is not None:
            raise RuntimeError(f"the engine has failed: {self.failure}")
        request.check_length(self.max_context)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        deltas: list[Delta] = []

        def emit(item: Delta | Exception) -> None:
            if isinstance(item, Delta):
                deltas.append(item)
                listen(item)
            if isinstance(item, Exception) or item.finish_reason is not None:
                loop.call_soon_threadsafe(_settle, done, item)

        running = Running(request, emit, TextStream(self.tokenizer, request.stop), Sampler(request.sampling))
        with self._wake:
            if self._closed:
                raise EngineClosed("the model made room for another")
            if len(self._rows) + len(self._waiting) >= self.decoder.max_batch_size + self.max_waiting:
                raise QueueFull(f"{len(self._rows)} requests run and {len(self._waiting)} wait")
            self._waiting.append(running)
            self.statistics.requests += 1
            self._wake.notify()
        try:
            await done
        finally:
            running.cancelled = True
        return Delta.join(deltas)

    def close(self) -> None:
        """Takes no more requests, and ends the thread once those that it has are done."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self, make_decoder: Callable[[], BatchedDecoder]) -> None:
        try:
            self.decoder = make_decoder()
            ends = self.decoder.model.generation_config.eos_token_id
            self.end_tokens = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
            self.max_context = min(self.max_context, self.decoder.max_context)
            self._ready.set()
            while self._wait_for_work():
                self._admit()
                if self._rows:
                    self._step()
                self._after_step()
        except Exception as error:
            self.failure = error
            self._ready.set()
            for running in [*self._rows, *self._waiting]:
                running.emit(RuntimeError(f"the engine has failed: {type(error).__name__}: {error}"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._waiting or self._rows or self._closed):
                self._wake.wait()
            return bool(self._waiting or self._rows or not self._closed)

    def _admit(self) -> None:
        """Prompts into free rows, as many as may come between two steps."""
        budget = PREFILL_TOKENS_PER_STEP
        while budget > 0 and len(self._rows) < self.decoder.max_batch_size:
            with self._wake:
                if not self._waiting:
                    break
                running = self._waiting.popleft()
            if running.cancelled:
                continue
            budget -= len(running.request.prompt_ids)
            self._start(running)
            self._after_step()
        self.statistics.waiting, self.statistics.running = len(self._waiting), len(self._rows)

    def _start(self, running: Running) -> None:
        request = running.request
        scored = request.echo and request.sampling.num_logprobs is not None
        logits = self.decoder.prefill(list(request.prompt_ids), all_logits=scored)
        self._rows.append(running)
        if request.echo:
            running.emit(self._echo(request, logits if scored else None))
        if request.max_tokens == 0:
            running.emit(Delta(finish_reason="length"))
            self._leave(running)
        else:
            self._take(running, running.sampler.pick(logits[-1]))

    def _echo(self, request: Generation, logits: torch.Tensor | None) -> Delta:
        """The prompt as a delta, each token with its log probability given those before it."""
        ids = request.prompt_ids
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        tokens = [Token(token) for token in ids]
        if logits is not None:
            scored = zip(logits, ids[1:], strict=False)  # the first token has none before it to be scored by
            tokens[1:] = [describe_token(row, token, request.sampling.num_logprobs) for row, token in scored]
        return Delta(text=str(text), prompt_tokens=tuple(self._spell(token, request) for token in tokens))

    def _spell(self, token: Token, request: Generation) -> Token:
        """The token with its text, and those beside it with theirs, where log probabilities are wanted."""
        if request.sampling.num_logprobs is None:
            return token
        top = tuple(replace(one, text=str(self.tokenizer.decode([one.id]))) for one in token.top)
        return replace(token, text=str(self.tokenizer.decode([token.id])), top=top)

    def _step(self) -> None:
        """One token for every row."""
        logits = self.decoder.step([running.last_token for running in self._rows])
        plain = logits.max(-1).indices.tolist() if any(r.sampler.is_plain for r in self._rows) else []
        picked = [
            Token(plain[row]) if running.sampler.is_plain else running.sampler.pick(logits[row])
            for row, running in enumerate(self._rows)
        ]
        for running, token in zip(list(self._rows), picked, strict=True):
            self._take(running, token)

    def _take(self, running: Running, token: Token) -> None:
        """Adds a token to a request's text, says so, and frees the row if that was the last."""
        request = running.request
        running.num_generated += 1
        running.last_token = token.id
        self.statistics.generated_tokens += 1
        reason: FinishReason | None = None
        text = ""
        if token.id in self.end_tokens and not request.ignore_eos:
            reason, text = "stop", running.stream.flush()
        else:
            text = running.stream.push(token.id)
            if running.stream.stopped:
                reason = "stop"
            elif running.num_generated >= request.max_tokens:
                reason, text = "length", text + running.stream.flush()
        if not running.cancelled:
            running.emit(Delta(text=text, tokens=(self._spell(token, request),), finish_reason=reason))
        if reason is not None or running.cancelled:
            self._leave(running)

    def _leave(self, running: Running) -> None:
        row = self._rows.index(running)
        last = self.decoder.release(row)
        self._rows[row] = self._rows[last]
        self._rows.pop()


def _settle(done: asyncio.Future[None], item: Delta | Exception) -> None:
    if done.done():
        return
    if isinstance(item, Exception):
        done.set_exception(item)
    else:
        done.set_result(None)
