"""The endpoint's HTTP routes, and what becomes of errors: always OpenAI's shape, never a traceback."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.params import Depends
from fastapi.responses import HTMLResponse, JSONResponse, Response
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.exceptions import HTTPException

from shoal_services.serving.events import first_line
from shoal_services.serving.gateway import Gateway, VariantDown
from shoal_services.serving.generation import OutOfMemory, QueueFull, RequestFailed
from shoal_services.serving.guard import BodyLimit, check_key
from shoal_services.serving.protocol import ChatRequest, CompletionRequest, TokenizeRequest, make_error
from shoal_services.serving.refusals import explain_body
from shoal_services.serving.routes import UnknownModel

RETRY_AFTER_S = 1
CLIENT_GONE = 499  # nginx's number; nobody sees it


def make_app(gateway: Gateway) -> FastAPI:
    """The FastAPI application whose routes speak to the gateway. Its keys and limits count as they are at the time."""
    app = FastAPI(title="Shoal", summary="Depth-compressed language models behind OpenAI's interfaces", docs_url=None)
    app.add_middleware(BodyLimit, find_max_bytes=lambda: gateway.limits.max_body_bytes)
    add_error_shapes(app)
    guarded = [Depends(check_key(lambda: gateway.keys))]
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
        for status, text in {
            400: "What was sent cannot be used", 401: "No valid API key", 404: "No such model", 408: "Took too long",
            413: "Too large", 429: "Too much at once", 503: "No replica can answer",
        }.items()
    }  # fmt: skip

    @app.post("/v1/completions", dependencies=guarded, responses=errors)
    async def complete(request: CompletionRequest, connection: Request) -> Response:
        return await _unless_gone(connection, gateway.complete(request))

    @app.post("/v1/chat/completions", dependencies=guarded, responses=errors)
    async def chat(request: ChatRequest, connection: Request) -> Response:
        return await _unless_gone(connection, gateway.chat(request))

    @app.post("/tokenize", dependencies=guarded, responses=errors)
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        return await gateway.tokenize(request)

    @app.get("/v1/models", dependencies=guarded, responses={401: errors[401]})
    async def models() -> dict[str, Any]:
        return gateway.list_models()

    @app.get("/v1/models/{model}", dependencies=guarded, responses={401: errors[401], 404: errors[404]})
    async def one_model(model: str) -> dict[str, Any]:
        return gateway.describe_model(model)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> str:
        return files("shoal_services.serving").joinpath("playground.html").read_text(encoding="utf-8")

    return app


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

    def shaped(status: int, message: str, **extra: Any) -> JSONResponse:
        headers = {"retry-after": str(RETRY_AFTER_S)} if status in (429, 503) else None
        return JSONResponse(make_error(status, message, **extra), status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(explain_body(error.errors()), 400)

    @app.exception_handler(HTTPException)
    async def plain(_request: Request, error: HTTPException) -> JSONResponse:
        response = shaped(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(UnknownModel)
    async def unknown(_request: Request, error: UnknownModel) -> JSONResponse:
        return shaped(404, str(error), param="model", code="model_not_found")

    @app.exception_handler(ValueError)
    async def refused(_request: Request, error: ValueError) -> JSONResponse:
        return shaped(400, first_line(error), code=getattr(error, "code", None))

    @app.exception_handler(TimeoutError)
    async def late(_request: Request, _error: TimeoutError) -> JSONResponse:
        return shaped(408, "the answer took longer than the endpoint's limit; lower max_tokens or try again")

    @app.exception_handler(QueueFull)
    async def full(_request: Request, error: QueueFull) -> JSONResponse:
        return shaped(429, str(error), code="queue_full")

    async def down(request: Request, error: Exception) -> JSONResponse:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ValueError):
            return await refused(request, cause)
        if isinstance(cause, RequestFailed) and not isinstance(cause, OutOfMemory):
            return shaped(500, first_line(error))
        return shaped(503, f"the variant cannot answer now: {first_line(error)}")

    for kind in (VariantDown, RayServeException, RayError):
        app.add_exception_handler(kind, down)
