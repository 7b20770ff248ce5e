"""The endpoint's HTTP routes, and what becomes of errors: always OpenAI's shape, never a traceback."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.exceptions import HTTPException

from shoal_services.serving.engine.generation import QueueFull
from shoal_services.serving.http.door import Door, make_error_response
from shoal_services.serving.http.failures import BrokenOff, VariantDown, describe_failure, find_cause
from shoal_services.serving.http.gateway import Gateway
from shoal_services.serving.http.health import HEALTHY
from shoal_services.serving.http.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from shoal_services.serving.http.refusals import explain_body
from shoal_services.serving.http.routes import UnknownModel

CLIENT_GONE = 499  # nginx's number; nobody sees it


def make_app(gateway: Gateway) -> Door:
    """The application whose routes speak to the gateway, behind its door. Keys and limits count as they are at the time."""
    summary = "Depth-compressed language models behind OpenAI's interfaces"
    app = FastAPI(title="Shoal", summary=summary, docs_url=None, redoc_url=None)
    add_error_shapes(app)
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
        for status, text in {
            400: "What was sent cannot be used", 401: "No valid API key", 404: "No such model",
            408: "The body did not come", 413: "Too large", 415: "Not JSON", 429: "Too much at once",
            503: "No replica can answer", 504: "No token came for too long",
        }.items()
    }  # fmt: skip

    @app.post("/v1/completions", responses=errors)
    async def complete(request: CompletionRequest, connection: Request) -> Response:
        return await _unless_gone(connection, gateway.complete(request))

    @app.post("/v1/chat/completions", responses=errors)
    async def chat(request: ChatRequest, connection: Request) -> Response:
        return await _unless_gone(connection, gateway.chat(request))

    @app.post("/tokenize", responses=errors)
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        return await gateway.tokenize(request)

    @app.get("/v1/models", responses={401: errors[401]})
    async def models() -> dict[str, Any]:
        return gateway.list_models()

    @app.get("/v1/models/{model:path}", responses={401: errors[401], 404: errors[404]})
    async def one_model(model: str) -> dict[str, Any]:
        return gateway.describe_model(model) if model else gateway.list_models()

    @app.get("/health", responses={503: {"description": "A variant cannot answer"}})
    async def health() -> Response:
        states = await gateway.health.find_states()
        down = {name: state for name, state in states.items() if state not in HEALTHY}
        return JSONResponse({"status": "unavailable" if down else "ok", "variants": states}, 503 if down else 200)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> str:
        return files("shoal_services.serving").joinpath("playground.html").read_text(encoding="utf-8")

    return Door(app, gateway)


async def _unless_gone(connection: Request, answer: Coroutine[None, None, Response]) -> Response:
    """The answer, or none if the client goes away before it is there: it is cancelled then."""

    async def leave() -> None:
        while (await connection.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(leave())
    await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if working.done():
        return working.result()
    working.cancel()
    await asyncio.wait({working})
    return Response(status_code=CLIENT_GONE)


def add_error_shapes(app: FastAPI) -> None:
    """Has the application say what is raised in OpenAI's shape, with the status that tells whether to ask again."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if not _is_json(request.headers.get("content-type", "")):
            return make_error_response(415, "send the body as JSON, with the header content-type: application/json")
        return JSONResponse(explain_body(error.errors()), 400)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        said = {404: f"there is no {request.url.path!r} here", 405: f"{request.method} is not for {request.url.path!r}"}
        message = said.get(error.status_code, str(error.detail))
        return make_error_response(error.status_code, message, headers=dict(error.headers or {}))

    @app.exception_handler(UnknownModel)
    async def unknown(_request: Request, error: UnknownModel) -> Response:
        return make_error_response(404, str(error), param="model", code="model_not_found")

    async def failed(_request: Request, error: Exception) -> Response:
        status, message = describe_failure(error)
        code = "queue_full" if status == 429 else getattr(find_cause(error), "code", None)
        return make_error_response(status, message, code=code)

    # Starlette logs what only `Exception` catches, as a mistake of ours.
    for kind in (QueueFull, ValueError, TimeoutError, VariantDown, BrokenOff, RayServeException, RayError, Exception):
        app.add_exception_handler(kind, failed)


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
