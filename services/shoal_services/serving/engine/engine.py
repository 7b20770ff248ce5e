"""Token generation behind one interface: requests in from any thread, pieces of text out as they come."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedTokenizerBase

from shoal_services.serving.engine.decoder import BatchedDecoder
from shoal_services.serving.engine.generation import (
    Delta,
    EngineClosed,
    EngineStatistics,
    Generation,
    OutOfMemory,
    QueueFull,
    Token,
)
from shoal_services.serving.engine.running import RunningRequest, explain_failure
from shoal_services.serving.engine.sampling import check_largest, describe_token
from shoal_services.serving.engine.spelling import Spelling

# Prompt tokens between two steps of those that are running: more, and their texts stall; fewer, and newcomers wait.
PREFILL_TOKENS_PER_STEP = 512


class Engine:
    """Continuous batching on a thread of its own: newcomers join between two steps, whoever is done leaves at once.

    What goes wrong with one request is said to whoever asked, and ends that request alone; only what every request would
    meet ends the engine.

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
        self._spelling = Spelling(tokenizer)
        self._after_step = after_step
        self.statistics = EngineStatistics()
        self.failure: Exception | None = None
        self._waiting: deque[RunningRequest] = deque()
        self._rows: list[RunningRequest] = []
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

        Cancelling it frees the request's row. Raises ValueError if prompt and new tokens exceed the context or the model
        has no such tokens, `QueueFull` if all rows are taken and `max_waiting` requests wait, `EngineClosed` after
        `close`, `RequestFailed` for what goes wrong with it later, and RuntimeError once the engine has failed.
        """
        request.check_length(self.max_context)
        request.check_tokens(self.decoder.num_embeddings)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        deltas: list[Delta] = []

        def emit(item: Delta | Exception) -> None:
            if isinstance(item, Delta):
                deltas.append(item)
                listen(item)
            if isinstance(item, Exception) or item.finish_reason is not None:
                loop.call_soon_threadsafe(_settle, done, item)

        running = RunningRequest(request, emit, self._spelling)
        with self._wake:
            if self.failure is not None:
                raise RuntimeError(f"the engine has failed: {self.failure}")
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
            with self._wake:
                if running in self._waiting:
                    self._waiting.remove(running)
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
            self.decoder.check_room(self.max_context)
            self._ready.set()
            while self._wait_for_work():
                self._admit()
                if self._rows:
                    self._step()
                self._after_step()
        except Exception as error:
            with self._wake:
                self.failure = error
            self._ready.set()
            for running in [*self._rows, *self._waiting]:
                running.fail(RuntimeError(f"the engine has failed: {type(error).__name__}: {error}"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._waiting or self._rows or self._closed):
                self._wake.wait()
            return bool(self._waiting or self._rows or not self._closed)

    def _admit(self) -> None:
        """Prompts into free rows, in their order, as many as may come between two steps."""
        budget = PREFILL_TOKENS_PER_STEP
        while budget > 0:
            with self._wake:
                if not self._waiting:
                    break
                if not self._waiting[0].cancelled and not self.decoder.has_room(self._waiting[0].request.num_tokens):
                    break
                running = self._waiting.popleft()
            if running.cancelled:
                continue
            budget -= len(running.request.prompt_ids)
            with self._alone(running):
                self._start(running)
            self._after_step()
        self.statistics.waiting, self.statistics.running = len(self._waiting), len(self._rows)

    @contextlib.contextmanager
    def _alone(self, running: RunningRequest) -> Iterator[None]:
        """What is raised within ends this request, and the engine only if it cannot take any other either."""
        try:
            yield
        except Exception as error:
            if running in self._rows:
                self._leave(running)
            failure = explain_failure(error)
            running.fail(failure)
            if failure is not error and not isinstance(failure, OutOfMemory):
                self.decoder.check_alive()

    def _start(self, running: RunningRequest) -> None:
        request, sampling = running.request, running.request.sampling
        scored: list[Token] = []

        def score(logits: torch.Tensor) -> None:
            following = request.prompt_ids[len(scored) + 1 :]
            scored.extend(
                describe_token(row, id, sampling.num_logprobs) for row, id in zip(logits, following, strict=False)
            )

        wanted = request.echo and sampling.num_logprobs is not None
        logits = self.decoder.prefill(
            list(request.prompt_ids), room=request.max_tokens, read=score if wanted else None
        )[-1]  # fmt: skip
        self._rows.append(running)
        if request.echo:
            running.emit(running.read_prompt(scored))
        if request.max_tokens == 0:
            running.emit(Delta(text=running.stream.flush(), finish_reason="length"))
            self._leave(running)
        else:
            self._take(running, running.sampler.pick(logits))

    def _step(self) -> None:
        """One token for every row."""
        logits = self._find_logits()
        if logits is None:
            return
        plain: list[list[float]] = []
        if any(running.sampler.is_plain for running in self._rows):
            plain = [values.tolist() for values in logits.max(-1)]
        for row, running in enumerate(list(self._rows)):
            with self._alone(running):
                if running.sampler.is_plain:
                    check_largest(plain[0][row])
                    self._take(running, Token(int(plain[1][row])))
                else:
                    self._take(running, running.sampler.pick(logits[row]))

    def _find_logits(self) -> torch.Tensor | None:
        """Logits of the next token of every row, None if none is left: where memory is short, the longest goes."""
        while self._rows:
            try:
                return self.decoder.step([running.last_token for running in self._rows])
            except (RuntimeError, MemoryError) as error:
                failure = explain_failure(error)
                if not isinstance(failure, OutOfMemory):
                    raise
                longest = max(self._rows, key=lambda running: running.length)
                self._leave(longest)
                longest.fail(failure)
        return None

    def _take(self, running: RunningRequest, token: Token) -> None:
        """Adds a token to a request's text, says so, and frees the row if that was the last."""
        self.statistics.generated_tokens += 1
        delta = running.take(token, ends=token.id in self.end_tokens and not running.request.ignore_eos)
        if not running.cancelled:
            running.emit(delta)
        if delta.finish_reason is not None or running.cancelled:
            self._leave(running)

    def _leave(self, running: RunningRequest) -> None:
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
