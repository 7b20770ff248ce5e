"""A checked request → calls of a variant → the answer in OpenAI's shape. No torch, no weights: any number of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import ray
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from shoal_services.serving.engine.generation import Call, QueueFull
from shoal_services.serving.http.experiments import Experiments
from shoal_services.serving.http.failures import BrokenOff, VariantDown
from shoal_services.serving.http.health import Health
from shoal_services.serving.http.keys import Key, KeyRing
from shoal_services.serving.http.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from shoal_services.serving.http.record import RequestRecord
from shoal_services.serving.http.routes import Router
from shoal_services.serving.http.sse import write_events
from shoal_services.serving.http.stream import AnswerStream
from shoal_services.serving.http.writers import ChatWriter, CompletionWriter
from shoal_services.serving.replica.channel import Inbox
from shoal_services.serving.settings import Limits, ShadowSettings

# What a card says of a variant to those who ask for models; the rest is the endpoint's own, as names of applications.
SHOWN = ("perplexity", "num_parameters")


class Gateway:
    """Chooses the variant, passes the call on, and writes the answer in OpenAI's shape.

    `reconfigure` changes variants and routes while requests run: each request keeps the variant that it began with.
    """

    def __init__(self) -> None:
        self.limits, self.keys = Limits(), KeyRing([])
        self.origins: list[str] = []
        self.local_only = True
        self.started_at = int(time.time())
        self.router = Router({}, {})
        self.handles: dict[str, DeploymentHandle] = {}
        self.inbox = Inbox(ray.util.get_node_ip_address())
        self.experiments = Experiments({}, self._handle, None)
        self.health = Health(lambda: self.router.variants)
        self._streams: WeakSet[AnswerStream] = WeakSet()

    def reconfigure(self, config: dict[str, Any]) -> None:
        """`variants`: public name → {app, model_cache, sleeps, and what the playground shows}; `routes`: name → weights;
        `shadows`: variant → {variant, share}; `observer`: the application that hears of both; `limits`; `keys`, hashed, or
        None; `origins` and `local_only`, as the door takes them."""
        self.limits = Limits.model_validate(config["limits"])
        keys = config["keys"]
        self.keys.replace(None if keys is None else [Key.model_validate(key) for key in keys])
        self.origins, self.local_only = config["origins"], config["local_only"]
        self.router = Router(config["variants"], config["routes"])
        self.handles = {
            card["app"]: self.handles.get(card["app"]) or _get_handle(card["app"], card["model_cache"])
            for card in self.router.variants.values()
        }
        shadows = {name: ShadowSettings.model_validate(shadow) for name, shadow in config["shadows"].items()}
        observer = serve.get_app_handle(config["observer"]) if config["observer"] else None
        self.experiments = Experiments(shadows, self._handle, observer)

    async def complete(self, request: CompletionRequest) -> Response:
        """/v1/completions."""
        name = self.router.choose(request.model, request.user)
        calls = [
            Call(
                prompt, request.max_tokens, request.sampling(request.logprobs, choice), request.stop_strings,
                request.ignore_eos, request.echo,
            )
            for prompt in request.prompts
            for choice in range(request.n)
        ]  # fmt: skip
        return await self._answer(name, calls, CompletionWriter(name, request.n), request)

    async def chat(self, request: ChatRequest) -> Response:
        """/v1/chat/completions."""
        name = self.router.choose(request.model, request.user)
        messages = tuple(message.as_template_input() for message in request.messages)
        num_logprobs = request.top_logprobs if request.logprobs else None
        calls = [
            Call(
                messages, request.num_new, request.sampling(num_logprobs, choice),
                request.stop_strings, request.ignore_eos,
            )
            for choice in range(request.n)
        ]  # fmt: skip
        return await self._answer(name, calls, ChatWriter(name, request.n), request)

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """/tokenize."""
        messages = tuple(message.as_template_input() for message in request.messages or ())
        prompt = messages if request.prompt is None else request.prompt
        handle = self._handle(self.router.choose(request.model, None))
        async with asyncio.timeout(self.limits.timeout_s):
            return await handle.tokenize.remote(prompt, request.add_special_tokens)

    def list_models(self) -> dict[str, Any]:
        """/v1/models: variants and routes, each with what is known of it."""
        return {"object": "list", "data": [self._card(name) for name in (*self.router.variants, *self.router.routes)]}

    def describe_model(self, name: str) -> dict[str, Any]:
        """/v1/models/NAME. Raises `UnknownModel`."""
        if name not in self.router.routes:
            name = self.router.choose(name, None)
        return self._card(name)

    def _card(self, name: str) -> dict[str, Any]:
        card = self.router.variants.get(name)
        known = {"route": self.router.routes[name]} if card is None else {key: card[key] for key in SHOWN}
        return {"id": name, "object": "model", "created": self.started_at, "owned_by": "shoal", **known}

    def break_off(self) -> None:
        """Ends the answers that still run, each with an error that says so."""
        for stream in list(self._streams):
            stream.fail(BrokenOff("the endpoint has stopped"))

    def _handle(self, name: str) -> DeploymentHandle:
        return self.handles[self.router.variants[name]["app"]]

    async def _answer(
        self, name: str, calls: list[Call], writer: CompletionWriter, request: CompletionRequest | ChatRequest
    ) -> Response:
        route = request.model if request.model in self.router.routes else None
        record = self.experiments.begin(name, route, calls)
        stream = AnswerStream(self.inbox, self._handle(name), record, timeout_s=self.limits.timeout_s)
        self._streams.add(stream)
        try:
            with _tell_refusals(record):
                if not request.stream:
                    pieces = await stream.collect()
                    stream.close()
                    return JSONResponse(writer.answer(pieces))
                # The first pieces come before the status line: whatever is refused is refused with its own status.
                await stream.take_firsts()
        except BaseException:
            stream.close()
            raise
        events = write_events(stream, writer, request.stream_options.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})


@contextmanager
def _tell_refusals(record: RequestRecord) -> Iterator[None]:
    """Raises `QueueFull` and `VariantDown` for what Serve would say as plain text."""
    try:
        yield
    except (QueueFull, BackPressureError) as error:
        record.end("refused")
        raise QueueFull("the variant's queue is full; try again in a moment") from error
    except DeploymentUnavailableError as error:
        record.end("failed")
        raise VariantDown("the variant has no replica that can answer; try again in a moment") from error
    except asyncio.CancelledError:
        record.end("left")
        raise
    except Exception:
        record.end("failed")
        raise


def _get_handle(app: str, model_cache: str | None) -> DeploymentHandle:
    """The handle to a variant's application; in the model cache its name is the id of a model there."""
    return serve.get_app_handle(model_cache).options(multiplexed_model_id=app) if model_cache else serve.get_app_handle(app)
