"""A connection to the endpoint: uvicorn's, with limits of ours for what comes before the application sees a request."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from http import HTTPStatus
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shoal_services.serving.http.door import make_error_response

HEAD_BYTES = 2**16
HEAD_WITHIN_S = 20.0
MAX_CONNECTIONS = 4096


class Connection(HttpToolsProtocol):
    """One connection. Its parser has no limits: without these, a head that never ends takes memory and a place for ever."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head_timer: TimerHandle | None = None
        self._head_bytes = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if self._head_timer is not None else 0
        if self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self._end(431, f"the request's headers are over {HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._have_head()
        full = len(self.connections) > MAX_CONNECTIONS
        self.app = _refuse_full if full else self.config.loaded_app
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What the parser refuses, in OpenAI's shape too."""
        self._end(400, msg)

    def _await_head(self) -> None:
        self._have_head()
        self._head_timer = self.loop.call_later(HEAD_WITHIN_S, self._give_up)

    def _have_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._end(408, f"the request's headers did not come within {HEAD_WITHIN_S:g} s")

    def _end(self, status: int, message: str) -> None:
        """Says so and closes; only closes where an answer is under way."""
        self._have_head()
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not (cycle.response_started or self.pipeline):
            response = make_error_response(status, message, headers={"connection": "close"})
            lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
            lines += [name + b": " + value for name, value in response.raw_headers]
            self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + bytes(response.body))
        self.transport.close()


async def _refuse_full(scope: Scope, receive: Receive, send: Send) -> None:
    await make_error_response(503, "too many connections; try again in a moment")(scope, receive, send)
