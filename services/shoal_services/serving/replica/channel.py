"""Pieces of text from replicas to gateways, past Ray: one message a step and gateway, whatever the number of requests.

A call itself goes through Ray Serve, which routes, counts, queues, cancels and notices dead replicas. Its pieces do
not: an item of a Ray generator costs both sides about a millisecond, for each token of each request, and with 32
requests at once that took a third of the cores. Messages are MessagePack, and carry the gateway's secret.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import zmq
import zmq.asyncio

from shoal_services.serving.engine.generation import Piece


@dataclass(frozen=True)
class Reply:
    """Where the pieces of a call go: a gateway's address and secret, and the call's number there."""

    address: str
    secret: bytes
    number: int


class Message(msgspec.Struct, array_like=True):
    """The pieces of one step for one gateway, each with its call's number."""

    secret: bytes
    pieces: list[tuple[int, Piece]]


class Outbox:
    """A replica's end. `put` and `flush` belong to the engine's thread."""

    def __init__(self) -> None:
        # The process's one: a context of its own could wait for ever for its sockets when both are collected.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._waiting: dict[tuple[str, bytes], list[tuple[int, Piece]]] = defaultdict(list)
        self._encoder = msgspec.msgpack.Encoder()

    def put(self, reply: Reply, piece: Piece) -> None:
        """Adds a piece to what the next `flush` sends."""
        self._waiting[reply.address, reply.secret].append((reply.number, piece))

    def flush(self) -> None:
        """Sends what has been put. Never waits: a gateway that is slow or gone holds nobody up."""
        for (address, secret), pieces in self._waiting.items():
            self._connect(address).send(self._encoder.encode(Message(secret, pieces)), zmq.NOBLOCK)
        self._waiting.clear()

    def _connect(self, address: str) -> zmq.Socket[bytes]:
        if address not in self._sockets:
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.SNDHWM, 0)  # what waits is bounded by the requests under way
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.IPV6, 1)
            socket.connect(address)
            self._sockets[address] = socket
        return self._sockets[address]


class Inbox:
    """A gateway's end: pieces go to whoever has opened their number."""

    def __init__(self, host: str):
        self._secret = secrets.token_bytes(16)
        self._listeners: dict[int, Callable[[Piece], object]] = {}
        self._numbers = itertools.count()
        self._decoder = msgspec.msgpack.Decoder(Message)
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.IPV6, 1)
        port = self._socket.bind_to_random_port(f"tcp://{f'[{host}]' if ':' in host else host}")
        self._address = f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
        self._task: asyncio.Task[None] | None = None

    def open(self, listen: Callable[[Piece], object]) -> Reply:
        """A new number, whose pieces `listen` gets on the event loop."""
        if self._task is None:
            self._task = asyncio.create_task(self._receive())
        number = next(self._numbers)
        self._listeners[number] = listen
        return Reply(self._address, self._secret, number)

    def close(self, reply: Reply) -> None:
        """Pieces that still come for this number are of no account."""
        self._listeners.pop(reply.number, None)

    async def _receive(self) -> None:
        while True:
            frame = await self._socket.recv()
            try:
                message = self._decoder.decode(frame)
            except msgspec.MsgspecError:
                continue  # not from a replica
            if not secrets.compare_digest(message.secret, self._secret):
                continue
            for number, piece in message.pieces:
                if listen := self._listeners.get(number):
                    listen(piece)
