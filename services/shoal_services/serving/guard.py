"""Who may call, how often, and how much they may send: API keys, rate limits, body limit."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request
from pydantic import Field, TypeAdapter
from shoal.files import write_text
from shoal.recipe import Value
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal_services.serving.protocol import make_error

PREFIX = "sk-shoal-"


class Key(Value):
    """An API key as it is stored: never itself, but its hash. Keys are random, so one round of SHA-256 is enough."""

    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(default=None, ge=1)


class KeyRing:
    """The keys that open the endpoint; without any, it is open. Each gateway counts for itself."""

    def __init__(self, keys: list[Key]):
        self.keys = keys
        self._tokens: dict[str, tuple[float, float]] = {}

    @classmethod
    def load(cls, file: Path) -> KeyRing:
        """Raises ValueError if the file is missing, damaged or empty."""
        try:
            keys = TypeAdapter(list[Key]).validate_json(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"key file {str(file)!r} cannot be read ({error}); make one with `shoal keys add`") from error
        if not keys:
            raise ValueError(f"key file {str(file)!r} holds no keys; add one with `shoal keys add NAME --file {file}`")
        return cls(keys)

    def find(self, secret: str) -> Key | None:
        """The key of that secret. Every key is compared, in constant time."""
        digest = hashlib.sha256(secret.encode()).hexdigest()
        matches = [key for key in self.keys if hmac.compare_digest(key.sha256, digest)]
        return matches[0] if matches else None

    def take(self, key: Key, *, now: float | None = None) -> float:
        """Counts one request; 0, or how many seconds until the next is allowed."""
        if key.requests_per_minute is None:
            return 0.0
        now = time.monotonic() if now is None else now
        per_s, burst = key.requests_per_minute / 60, float(max(1, key.requests_per_minute // 6))
        level, then = self._tokens.get(key.name, (burst, now))
        level = min(burst, level + (now - then) * per_s)
        allowed = level >= 1
        self._tokens[key.name] = (level - 1 if allowed else level, now)
        return 0.0 if allowed else (1 - level) / per_s


def add_key(file: Path, name: str, requests_per_minute: int | None) -> str:
    """Puts a new key into the file (readable by its owner alone) and returns its secret, which is kept nowhere.

    Raises ValueError if the name is taken.
    """
    held = KeyRing.load(file).keys if file.exists() else []
    if any(key.name == name for key in held):
        raise ValueError(f"{str(file)!r} holds a key named {name!r} already; revoke it first, or choose another name")
    secret = PREFIX + secrets.token_urlsafe(32)
    new = Key(name=name, sha256=hashlib.sha256(secret.encode()).hexdigest(), requests_per_minute=requests_per_minute)
    _write_keys(file, [*held, new])
    return secret


def revoke_key(file: Path, name: str) -> None:
    """Takes a key out of the file. Raises ValueError if it is not there."""
    held = KeyRing.load(file).keys
    if all(key.name != name for key in held):
        raise ValueError(f"{str(file)!r} holds no key named {name!r}; it has {', '.join(key.name for key in held)}")
    _write_keys(file, [key for key in held if key.name != name])


def _write_keys(file: Path, keys: list[Key]) -> None:
    write_text(file, json.dumps([key.model_dump() for key in keys], indent=2))
    file.chmod(0o600)


def check_key(find_keys: Callable[[], KeyRing]) -> Callable[[Request], Awaitable[None]]:
    """A FastAPI dependency that lets a request with a valid key pass: 401 without one, 429 over its rate."""

    async def check(request: Request) -> None:
        keys = find_keys()
        if not keys.keys:
            return
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        key = keys.find(secret) if scheme.lower() == "bearer" else None
        if key is None:
            raise HTTPException(401, "give a valid API key: Authorization: Bearer KEY", {"www-authenticate": "Bearer"})
        wait_s = keys.take(key)
        if wait_s:
            message = f"key {key.name!r} is over its {key.requests_per_minute} requests a minute"
            raise HTTPException(429, message, {"retry-after": str(int(wait_s) + 1)})

    return check


class BodyLimit:
    """ASGI middleware: 413 for bodies over so many bytes, before they are held in memory."""

    def __init__(self, app: ASGIApp, find_max_bytes: Callable[[], int]):
        self.app, self.find_max_bytes = app, find_max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        chunks, size, max_bytes = [], 0, self.find_max_bytes()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return  # gone before the body was whole
            size += len(message.get("body", b""))
            if size > max_bytes:
                await self._refuse(send, max_bytes)
                return
            chunks.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        whole: list[Message] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)

    async def _refuse(self, send: Send, max_bytes: int) -> None:
        error: dict[str, Any] = make_error(413, f"the request's body is over {max_bytes} bytes")
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(error).encode()})
