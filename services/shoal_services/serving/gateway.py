"""The HTTP side: OpenAI's interfaces over the variants. Light: no torch, no weights, any number of replicas."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from shoal_services.serving.events import Pieces, count_tokens, write_events
from shoal_services.serving.generation import Call, Piece
from shoal_services.serving.protocol import ChatRequest, ChatWriter, CompletionRequest, CompletionWriter, TokenizeRequest
from shoal_services.serving.routes import Router
from shoal_services.serving.settings import Limits


class QueueFull(Exception):
    """A variant has as many requests as its limits allow."""


class VariantDown(Exception):
    """A variant has no replica that answers."""


class Gateway:
    """Chooses the variant, passes the call on, and writes the answer in OpenAI's shape.

    `reconfigure` changes variants and routes while requests run: each request keeps the variant that it began with.
    """

    def __init__(self, limits: dict[str, Any]):
        self.limits = Limits.model_validate(limits)
        self.started_at = int(time.time())
        self.router = Router({}, {})
        self.handles: dict[str, DeploymentHandle] = {}

    def reconfigure(self, config: dict[str, Any]) -> None:
        """`variants`: public name → {app, and what the playground shows}; `routes`: name → weights."""
        self.router = Router(config.get("variants", {}), config.get("routes", {}))
        self.handles = {
            card["app"]: self.handles.get(card["app"]) or serve.get_app_handle(card["app"])
            for card in self.router.variants.values()
        }

    async def complete(self, request: CompletionRequest) -> Response:
        """/v1/completions."""
        name = self.router.choose(request.model, request.user)
        calls = [
            Call(
                prompt, 16 if request.max_tokens is None else request.max_tokens,
                request.sampling(request.logprobs, choice), request.stop_strings, request.ignore_eos,
                bool(request.echo), bool(request.stream),
            )
            for prompt in request.prompts
            for choice in range(request.n or 1)
        ]  # fmt: skip
        return await self._answer(name, calls, CompletionWriter(name, len(calls)), request)

    async def chat(self, request: ChatRequest) -> Response:
        """/v1/chat/completions."""
        name = self.router.choose(request.model, request.user)
        messages = tuple(message.as_template_input() for message in request.messages)
        num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        calls = [
            Call(
                messages, request.max_completion_tokens or request.max_tokens, request.sampling(num_logprobs, choice),
                request.stop_strings, request.ignore_eos, False, bool(request.stream),
            )
            for choice in range(request.n or 1)
        ]  # fmt: skip
        return await self._answer(name, calls, ChatWriter(name, len(calls)), request)

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """/tokenize."""
        messages = tuple(message.as_template_input() for message in request.messages or ())
        prompt = messages if request.prompt is None else request.prompt
        handle = self._handle(self.router.choose(request.model, None))
        return await handle.tokenize.remote(prompt, request.add_special_tokens)

    def list_models(self) -> dict[str, Any]:
        """/v1/models: variants and routes, each with what is known of it."""
        return {"object": "list", "data": [self._card(name) for name in (*self.router.variants, *self.router.routes)]}

    def describe_model(self, name: str) -> dict[str, Any]:
        """/v1/models/NAME."""
        if name not in self.router.routes:
            name = self.router.choose(name, None)
        return self._card(name)

    def _card(self, name: str) -> dict[str, Any]:
        known = {key: value for key, value in self.router.variants.get(name, {}).items() if key != "app"}
        if name in self.router.routes:
            known = {"route": self.router.routes[name]}
        return {"id": name, "object": "model", "created": self.started_at, "owned_by": "shoal", **known}

    def _handle(self, name: str) -> DeploymentHandle:
        return self.handles[self.router.variants[name]["app"]]

    async def _answer(
        self, name: str, calls: list[Call], writer: CompletionWriter, request: CompletionRequest | ChatRequest
    ) -> Response:
        streaming = self._handle(name).options(stream=True)
        answers = [cast(Pieces, streaming.generate.remote(call)) for call in calls]
        iterators = [aiter(answer) for answer in answers]
        # The first pieces come before the status line: whatever is refused is refused with its own status.
        firsts = await self._take_first(iterators)
        if not request.stream:
            return JSONResponse(writer.answer([piece.delta for piece in firsts], count_tokens(firsts)))
        wants_usage = request.stream_options is not None and request.stream_options.include_usage
        events = write_events(list(firsts), iterators, writer, wants_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def _take_first(self, iterators: list[Pieces]) -> list[Piece]:
        """The first piece of each answer. Raises `QueueFull`, `VariantDown`, TimeoutError, or what a replica raised."""
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                return list(await asyncio.gather(*(anext(iterator) for iterator in iterators)))
        except BackPressureError as error:  # Serve would answer these two itself, as plain text
            raise QueueFull("the variant's queue is full; try again in a moment") from error
        except DeploymentUnavailableError as error:
            raise VariantDown("the variant has no replica that can answer; try again in a moment") from error
