"""Why a request is refused, in OpenAI's shape."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from shoal_services.serving.http.protocol import (
    FORMS,
    ChatRequest,
    CompletionRequest,
    Message,
    StreamOptions,
    TextPart,
    TokenizeRequest,
    make_error,
)

BODIES = (ChatRequest, CompletionRequest, TokenizeRequest)


def explain_body(complaints: Sequence[Any]) -> dict[str, Any]:
    """The error for the complaints that pydantic has of a body, of which the first is told."""
    complaint = complaints[0]
    parts = [str(part) for part in complaint["loc"] if part != "body" and part not in FORMS]
    path = ".".join(parts)
    if complaint["type"] == "extra_forbidden":
        message = f"unsupported parameter {path!r}{_suggest(parts)}"
        return make_error(400, message, param=path, code="unsupported_parameter")
    message = complaint["msg"].removeprefix("Value error, ")
    return make_error(400, f"{path}: {message}" if path else message, param=path or None)


def _suggest(parts: list[str]) -> str:
    """The nearest of the parameters that there are in the same place."""
    *place, name = parts
    models = (Message, TextPart) if "messages" in place else (StreamOptions,) if place else BODIES
    known = {field for model in models for field in model.model_fields} - {name}
    offered = {field for model in models for field in model.neutral}
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close and name not in offered else ""
