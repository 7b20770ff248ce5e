"""The gateway as a Ray Serve deployment: with an HTTP server of its own, or behind Serve's HTTP proxies.

The proxies' hop cost 12 of the 31 ms of a short request on two slow cores, and about 2 ms of processor time for every
piece of a stream; they know none of the limits of `wire`. They are for KubeRay, whose service leads to them and
whose probes ask them. Serve starts either gateway, watches it, tells it what changed and lets it drain.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn

from shoal_services.serving.http.door import Door
from shoal_services.serving.http.gateway import Gateway
from shoal_services.serving.http.web import make_app
from shoal_services.serving.http.wire import Connection
from shoal_services.serving.settings import Limits

# Longer than clients and load balancers keep a connection that is idle: whoever closes first loses no request.
KEEP_ALIVE_S = 75
# Until answers that were broken off have said so.
LAST_WORDS_S = 2.0
# What Serve takes to begin, and what is over when an answer has ended.
MARGIN_S = 8.0


class GatewayServer:
    """Listens once it has been told what there is to serve. Raises OSError if the port is taken.

    Several listen on one port, and the kernel shares the connections out among them.
    """

    def __init__(self, host: str, port: int):
        self.gateway = Gateway()
        self._socket = bind(host, port, shared=True)
        # Not started here: Serve makes this object outside of the event loop that it runs on.
        self._server = uvicorn.Server(
            uvicorn.Config(
                make_app(self.gateway), http=Connection, ws="none", log_config=None, log_level="error", access_log=False,
                lifespan="off", server_header=False, timeout_keep_alive=KEEP_ALIVE_S,
            )
        )  # fmt: skip
        self._serving: asyncio.Task[None] | None = None

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """As `Gateway.reconfigure`: requests that run are not disturbed."""
        self.gateway.reconfigure(config)
        if self._serving is None:
            self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    def check_health(self) -> None:
        """Raises once nothing listens any more: Serve then starts another."""
        if self._serving is not None and self._serving.done():
            raise RuntimeError("the HTTP server has ended")

    async def __del__(self) -> None:
        """Takes no more connections, and waits until running requests are answered, or have had their time."""
        self._server.should_exit = True
        if self._serving is None:
            return
        _, late = await asyncio.wait({self._serving}, timeout=self.gateway.limits.drain_s)
        if late:
            self.gateway.break_off()
            await asyncio.wait(late, timeout=LAST_WORDS_S)


class ProxiedGateway:
    """Behind Serve's proxies, which keep the connections and drain them."""

    def __init__(self) -> None:
        self.gateway = Gateway()

    def reconfigure(self, config: dict[str, Any]) -> None:
        """As `Gateway.reconfigure`."""
        self.gateway.reconfigure(config)

    def __serve_build_asgi_app__(self) -> Door:
        return make_app(self.gateway)


def find_grace_s(limits: Limits) -> float:
    """How long Serve has to wait for a replica that is to end, for its answers to have the time that they are promised."""
    return limits.drain_s + LAST_WORDS_S + MARGIN_S


def bind(host: str, port: int, *, shared: bool) -> socket.socket:
    """A socket bound to the port; `shared` with others that say so too. Raises OSError if it is taken."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        made.bind((host, port))
    except OSError:
        made.close()
        raise
    return made


def require_free_port(host: str, port: int) -> None:
    """Raises OSError if something listens there already."""
    try:
        bind(host, port, shared=False).close()
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port or --host") from error
