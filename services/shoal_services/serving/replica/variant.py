"""One served model: a Ray Serve deployment whose replicas each hold the weights, the tokenizer and an engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ray.serve.exceptions import RayServeException

from shoal_services.serving.engine.generation import Call, Delta, EngineFailed, Generation, Piece, Prompt
from shoal_services.serving.replica.channel import Outbox, Reply
from shoal_services.serving.replica.meters import Meters, RequestTimes
from shoal_services.serving.replica.prompts import encode
from shoal_services.serving.settings import Limits, VariantSettings

if TYPE_CHECKING:
    from shoal_services.serving.engine.engine import Engine
    from shoal_services.serving.engine.vllm_engine import VllmEngine


class Variant:
    """Answers calls for one model. Heavy imports wait until a replica starts."""

    def __init__(self, name: str, model: str, variant: dict[str, Any], limits: dict[str, Any]):
        from shoal.checkpoints.load import load_tokenizer

        settings = VariantSettings.model_validate(variant)
        self.meters = Meters(name)
        self.limits = Limits.model_validate(limits)
        self.tokenizer = load_tokenizer(model)
        self.outbox = Outbox()
        make_engine = self._start_vllm if settings.engine == "vllm" else self._start_engine
        self.engine = make_engine(model, settings)
        self.max_context = self.engine.max_context

    def _start_engine(self, model: str, settings: VariantSettings) -> Engine:
        import torch
        from shoal.checkpoints.load import load_model

        from shoal_services.serving.engine.decoder import BatchedDecoder
        from shoal_services.serving.engine.engine import Engine

        def make_decoder() -> BatchedDecoder:
            # Ray sets 1 where no CPU is reserved.
            torch.set_num_threads(int(settings.cpus_per_replica) or os.cpu_count() or 1)
            return BatchedDecoder(
                load_model(model, dtype=settings.dtype), max_batch_size=limits.max_batch_size,
                max_cached=max(limits.max_cached_tokens, limits.max_context),
            )  # fmt: skip

        limits = self.limits
        return Engine(
            make_decoder, self.tokenizer, max_context=limits.max_context, max_waiting=limits.max_queued,
            after_step=self._tell_step,
        )  # fmt: skip

    def _start_vllm(self, model: str, settings: VariantSettings) -> VllmEngine:
        from shoal.checkpoints.packaged import ALIASES, convert_packaged

        from shoal_services.serving.engine.vllm_engine import VllmEngine

        folder = str(convert_packaged(model)) if model in ALIASES else model
        return VllmEngine(folder, settings, self.limits, self.tokenizer, self._tell_step)

    async def generate(self, call: Call, reply: Reply | None = None) -> Piece:
        """The whole answer; with `reply`, its pieces go there while they are made, and what is returned is empty.

        Raises ValueError for a prompt that does not fit or cannot be read, `QueueFull` if too many wait, `EngineFailed`.
        """
        ids = encode(self.tokenizer, call.prompt)
        room = max(1, self.max_context - len(ids))
        max_tokens = min(room, self.limits.max_tokens) if call.max_tokens is None else call.max_tokens
        request = Generation(ids, max_tokens, call.sampling, call.stop, call.ignore_eos, call.echo)
        watch = RequestTimes(self.meters, len(ids))

        def listen(delta: Delta) -> None:
            watch.hear(delta)
            if reply is not None:
                self.outbox.put(reply, Piece(delta, len(ids)))

        try:
            whole = await self.engine.generate(request, listen)
        except Exception as error:
            if self.engine.failure is None:
                raise
            raise EngineFailed("the engine has failed") from error
        return Piece(whole if reply is None else Delta(), len(ids))

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool) -> dict[str, Any]:
        """Token ids and their number, and the context's length. Raises ValueError for a chat without a template."""
        ids = encode(self.tokenizer, prompt, add_special_tokens=add_special_tokens)
        return {"count": len(ids), "max_model_len": self.max_context, "tokens": list(ids)}

    def _tell_step(self) -> None:
        """Sends what a step has made. Runs where pieces are heard: on the engine's thread, or vLLM's event loop."""
        self.outbox.flush()
        self.meters.show(self.engine.statistics)

    def check_health(self) -> None:
        """Raises once the engine has failed: Serve then starts another replica."""
        if self.engine.failure is not None:
            raise RayServeException(f"the engine has failed: {self.engine.failure}")

    def __del__(self) -> None:
        """Frees the engine's thread when Serve makes room for another model; its requests finish first."""
        if engine := getattr(self, "engine", None):
            engine.close()
