"""The endpoint's door: what is decided from a request's head, before any of its body is read, and how much is read then."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
from typing import Any, Protocol
from urllib.parse import urlsplit

from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal_services.serving.http.keys import KeyRing
from shoal_services.serving.http.protocol import make_error
from shoal_services.serving.settings import Limits

# Whoever knocks may see the page, which holds nothing but itself, and whether the endpoint is well.
PUBLIC = {"/", "/health", "/health/live"}
RETRY_AFTER_S = 1


class Policy(Protocol):
    """What the door goes by, as it is at the time. `local_only`: without keys, for programs of this machine alone."""

    keys: KeyRing
    limits: Limits
    origins: list[str]
    local_only: bool


class Door:
    """ASGI middleware around the whole application: origins, keys and sizes, in that order; errors in OpenAI's shape."""

    body_within_s, linger_s = 60.0, 2.0

    def __init__(self, app: ASGIApp, policy: Policy):
        self.app, self.policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif refusal := self._check_origin(scope["method"], Headers(scope=scope)):
            await self._refuse(refusal, scope, receive, send)
        else:
            # Keys travel in a header of their own and never in cookies: a page has no more than it was given.
            cors = CORSMiddleware(
                self._enter, self.policy.origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["retry-after"]
            )
            await cors(scope, receive, send)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        path = "/" + scope["path"].removeprefix(scope.get("root_path", "")).lstrip("/")
        refusal = self._check_key(path, headers) or self._check_size(headers)
        if refusal is not None:
            await self._refuse(refusal, scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.body_within_s):
                body = await self._read(receive)
        except TimeoutError:
            message = f"the request's body did not come within {self.body_within_s:g} s"
            await make_error_response(408, message, headers={"connection": "close"})(scope, receive, send)
            return
        if body is None:
            return  # gone before the body was whole
        if isinstance(body, Response):
            await self._refuse(body, scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        # The server leaves the body out where HEAD was asked.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await self.app({**scope, "method": method}, replay, send)

    def _check_origin(self, method: str, headers: Headers) -> Response | None:
        """Without keys, web pages stay out: those of other origins, and those whose name was made to point here."""
        policy, origin, host = self.policy, headers.get("origin"), headers.get("host")
        allowed = origin is None or "*" in policy.origins or origin in policy.origins
        same = origin is not None and origin.partition("://")[2] == host
        if policy.local_only and host and not _is_local(host):
            message = f"without keys, this endpoint is for programs of its own machine, which do not call it {host!r}; "
            message += "give `keys: FILE` in serve.yaml, or say `allow_anonymous: true`"
            return make_error_response(403, message, code="host_not_allowed")
        preflight = method == "OPTIONS" and "access-control-request-method" in headers
        if not allowed and not same and (policy.local_only or preflight):
            message = f"pages of {origin!r} may not call this endpoint; name it under `cors_origins` in serve.yaml"
            return make_error_response(403, message, code="origin_not_allowed")
        return None

    def _check_key(self, path: str, headers: Headers) -> Response | None:
        ring = self.policy.keys
        if ring.keys is None or path in PUBLIC:
            return None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        key = ring.find(secret.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            message = "give a valid API key: Authorization: Bearer KEY"
            return make_error_response(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        if wait_s := ring.take(key):
            message = f"key {key.name!r} is over its {key.requests_per_minute} requests a minute"
            after = {"retry-after": str(int(wait_s) + 1)}
            return make_error_response(429, message, code="rate_limit_exceeded", headers=after)
        return None

    def _check_size(self, headers: Headers) -> Response | None:
        if headers.get("content-encoding", "identity").lower() != "identity":
            return make_error_response(
                415, f"bodies encoded as {headers['content-encoding']!r} are not read; send plain JSON"
            )
        size = headers.get("content-length", "0")
        return self._too_large() if size.isdecimal() and int(size[:20]) > self.policy.limits.max_body_bytes else None

    def _too_large(self) -> Response:
        return make_error_response(413, f"the request's body is over {self.policy.limits.max_body_bytes} bytes")

    async def _refuse(self, response: Response, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers at once, then takes in for a moment what is still being sent: to close on it could lose the answer."""
        headers = Headers(scope=scope)
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            await response(scope, receive, send)
            return
        response.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.linger_s):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _read(self, receive: Receive) -> bytes | Response | None:
        """The body; the refusal of one that is too large; None if the client went away."""
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self.policy.limits.max_body_bytes:
                return self._too_large()
            if not message.get("more_body"):
                return b"".join(chunks)


def make_error_response(
    status: int, message: str, *, headers: dict[str, str] | None = None, **more: str | None
) -> Response:
    """An error in OpenAI's shape. ASCII, so that whatever a client sent can be said back to it."""
    error: dict[str, Any] = make_error(status, message, **more)
    after = {"retry-after": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    return Response(json.dumps(error), status, after | (headers or {}), "application/json")


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine in a way that no name server can have made up."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
