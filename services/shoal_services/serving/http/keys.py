"""Who may call, and how often: API keys and their rate limits."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field, TypeAdapter
from shoal.files import write_aside
from shoal.value import Value

PREFIX = "sk-shoal-"


class Key(Value):
    """An API key as it is stored: never itself, but its hash. Keys are random, so one round of SHA-256 is enough."""

    name: str = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(default=None, ge=1)


class KeyRing:
    """The keys that open the endpoint. None: it is open. An empty list: nobody gets in. Each gateway counts for itself."""

    def __init__(self, keys: list[Key] | None):
        self.keys = keys
        self._levels: dict[str, tuple[float, float]] = {}

    def replace(self, keys: list[Key] | None) -> None:
        """Other keys from now on; those that stay have spent what they have spent."""
        self.keys = keys
        names = {key.name for key in keys or []}
        self._levels = {name: level for name, level in self._levels.items() if name in names}

    def find(self, secret: str) -> Key | None:
        """The key of that secret. Every key is compared, in constant time."""
        digest = hashlib.sha256(secret.encode()).hexdigest()
        matches = [key for key in self.keys or [] if hmac.compare_digest(key.sha256, digest)]
        return matches[0] if matches else None

    def take(self, key: Key, *, now: float | None = None) -> float:
        """Counts one request; 0, or how many seconds until the next is allowed."""
        if key.requests_per_minute is None:
            return 0.0
        now = time.monotonic() if now is None else now
        per_s, burst = key.requests_per_minute / 60, float(max(1, key.requests_per_minute // 6))
        level, then = self._levels.get(key.name, (burst, now))
        level = min(burst, level + (now - then) * per_s)
        allowed = level >= 1
        self._levels[key.name] = (level - 1 if allowed else level, now)
        return 0.0 if allowed else (1 - level) / per_s


def read_keys(file: Path) -> list[Key]:
    """The keys that a file holds. Raises ValueError if it is missing or damaged."""
    try:
        return TypeAdapter(list[Key]).validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"key file {str(file)!r} cannot be read ({error}); make one with `shoal keys add`") from error


def require_keys(file: Path) -> list[Key]:
    """The keys to begin with. Raises ValueError if the file is missing, damaged or empty."""
    keys = read_keys(file)
    if not keys:
        raise ValueError(f"key file {str(file)!r} holds no keys; add one with `shoal keys add NAME --file {file}`")
    return keys


def add_key(file: Path, name: str, requests_per_minute: int | None) -> str:
    """Puts a new key into the file (readable by its owner alone) and returns its secret, which is kept nowhere.

    Raises ValueError if the name is taken.
    """
    with _alone(file):
        held = read_keys(file) if file.exists() else []
        if any(key.name == name for key in held):
            raise ValueError(f"{str(file)!r} holds a key named {name!r} already; revoke it first, or choose another name")
        secret = PREFIX + secrets.token_urlsafe(32)
        new = Key(name=name, sha256=hashlib.sha256(secret.encode()).hexdigest(), requests_per_minute=requests_per_minute)
        _write_keys(file, [*held, new])
    return secret


def revoke_key(file: Path, name: str) -> None:
    """Takes a key out of the file; without any left, nobody gets in. Raises ValueError if it is not there."""
    with _alone(file):
        held = read_keys(file)
        if all(key.name != name for key in held):
            names = ", ".join(key.name for key in held) or "none"
            raise ValueError(f"{str(file)!r} holds no key named {name!r}; it has {names}")
        _write_keys(file, [key for key in held if key.name != name])


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One at a time: of two that read, change and write at once, the second would undo the first."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write_keys(file: Path, keys: list[Key]) -> None:
    with write_aside(file) as aside:
        aside.touch(0o600)
        aside.write_text(json.dumps([key.model_dump() for key in keys], indent=2), encoding="utf-8")
