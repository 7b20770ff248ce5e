"""vLLM behind the same interface as `engine`: requests in, pieces of text out."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from shoal_services.serving.engine.generation import (
    Delta,
    EngineStatistics,
    FinishReason,
    Generation,
    QueueFull,
    RequestFailed,
    Token,
)
from shoal_services.serving.engine.spelling import Spelling
from shoal_services.serving.engine.text_stream import TextStream
from shoal_services.serving.engine.vllm_plugin import refuse_modules, register
from shoal_services.serving.settings import Limits, VariantSettings


class VllmEngine:
    """vLLM's asynchronous engine, which computes in a process of its own.

    Raises ValueError if vLLM is not installed, and what vLLM raises for a model that it cannot serve.
    """

    def __init__(
        self, folder: str, settings: VariantSettings, limits: Limits, tokenizer: PreTrainedTokenizerBase,
        after_step: Callable[[], object],
    ):  # fmt: skip
        try:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ValueError(
                f"vLLM is not installed here ({error}); pip install 'shoal[vllm]', or say engine: transformers"
            ) from error
        register()  # vLLM does so too, but later than the configuration is read here
        config = AutoConfig.from_pretrained(folder)
        refuse_modules(config)
        length = min(limits.max_context, getattr(config, "max_position_embeddings", None) or 2**31)
        arguments = AsyncEngineArgs(
            model=folder, dtype=settings.dtype or "auto", max_model_len=length, max_num_seqs=limits.max_batch_size,
            **{"enable_log_requests": False, "disable_log_stats": True, **settings.engine_options},
        )  # fmt: skip
        self.engine = AsyncLLM.from_engine_args(arguments)
        self.max_context: int = length
        self.statistics = EngineStatistics()
        self._limits, self._spelling, self._after_step = limits, Spelling(tokenizer), after_step
        self._numbers = itertools.count()
        self._told = False

    @property
    def failure(self) -> Exception | None:
        """What ended the engine, None while it runs."""
        return RuntimeError("vLLM's process has ended") if self.engine.errored else None

    async def generate(self, request: Generation, listen: Callable[[Delta], object] = lambda _delta: None) -> Delta:
        """The whole answer; `listen` hears its pieces on the event loop. Cancelling it frees the request's place.

        Raises ValueError if prompt and new tokens exceed the context, `QueueFull` if too many wait.
        """
        request.check_length(self.max_context)
        statistics = self.statistics
        if statistics.running >= self._limits.max_batch_size + self._limits.max_queued:
            raise QueueFull(f"{statistics.running} requests run and wait")
        deltas: list[Delta] = []
        stream = TextStream(self._spelling)
        if not request.echo:
            stream.follow(request.prompt_ids)
        statistics.requests += 1
        statistics.running += 1
        try:
            async for output in self.engine.generate(
                {"prompt_token_ids": list(request.prompt_ids)}, _sampling(request), str(next(self._numbers))
            ):
                if request.echo and not deltas:
                    deltas.append(_echo(output, request, stream))
                    listen(deltas[-1])
                deltas.append(_read(output.outputs[0], request, stream))
                statistics.generated_tokens += len(deltas[-1].tokens)
                listen(deltas[-1])
                self._tell_soon()
        finally:
            statistics.running -= 1
        return Delta.join(deltas)

    def close(self) -> None:
        """Ends vLLM's process."""
        self.engine.shutdown()

    def _tell_soon(self) -> None:
        """Once for all pieces of a step, which come to the event loop together."""
        if not self._told:
            self._told = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._told = False
        self._after_step()


def _sampling(request: Generation) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    wanted = request.sampling
    return SamplingParams(
        temperature=wanted.temperature, top_p=wanted.top_p, top_k=wanted.top_k,
        presence_penalty=wanted.presence_penalty, frequency_penalty=wanted.frequency_penalty, seed=wanted.seed,
        logprobs=wanted.num_logprobs, prompt_logprobs=wanted.num_logprobs if request.echo else None,
        stop=list(request.stop), ignore_eos=request.ignore_eos, max_tokens=max(1, request.max_tokens),
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip


def _echo(output: Any, request: Generation, stream: TextStream) -> Delta:
    """The prompt as a delta, each token but the first with its log probability where those are wanted."""
    ids = request.prompt_ids
    text, tokens = _spell(ids, output.prompt_logprobs, request, stream)
    return Delta(text=text, prompt_tokens=tokens)


def _read(output: Any, request: Generation, stream: TextStream) -> Delta:
    reason: FinishReason | None = output.finish_reason
    if reason not in (None, "stop", "length"):
        raise RequestFailed(f"vLLM ended the request: {reason}")
    if request.max_tokens == 0:  # vLLM generates one token at least; who wants none gets the prompt alone
        return Delta(finish_reason="length")
    _, tokens = _spell(output.token_ids, output.logprobs, request, stream)
    return Delta(text=output.text, tokens=tokens, finish_reason=reason)


def _spell(
    ids: Sequence[int], scores: Sequence[Any] | None, request: Generation, stream: TextStream
) -> tuple[str, tuple[Token, ...]]:
    """The text that these tokens add, and each of them with what is wanted of it."""
    number, text, tokens = request.sampling.num_logprobs, "", []
    for id, score in zip(ids, scores or [None] * len(ids), strict=True):
        token = _describe(id, score, number)
        tokens.append(token if number is None else stream.spelling.label(token, stream.before))
        text += stream.read([id])
    return text, tuple(tokens)


def _describe(token: int, scores: dict[int, Any] | None, number: int | None) -> Token:
    """The token, with vLLM's scores of it and of the `number` likeliest where it gave any."""
    if scores is None:
        return Token(token)
    ranked = sorted(scores.items(), key=lambda item: -item[1].logprob)[:number]
    return Token(token, logprob=scores[token].logprob, top=tuple(Token(id, logprob=score.logprob) for id, score in ranked))
