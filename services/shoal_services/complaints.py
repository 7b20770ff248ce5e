"""A configuration's errors in words that name the key, the value and the nearest known key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)
# The forms of an axis: pydantic puts the tag of a form into the place of an error.
AXIS_TAGS = ("constant", "choice", "range")
RANGES = ("uniform", "loguniform", "randint")


def read_strict(path: Path, model: type[M], *, example: str) -> M:
    """A YAML file as a value of `model`. Raises ValueError that names file, key and remedy."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{str(path)!r} holds no mapping; see {example} for the form")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ValueError(explain_validation(error, model, path.name)) from error


def explain_validation(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """All of a validation error's complaints, one a line, each with key, value and the nearest known key."""
    lines: dict[str, None] = {}
    for complaint in error.errors():
        path = list(complaint["loc"])
        key = ".".join(str(part) for part in path if part not in AXIS_TAGS)
        if complaint["type"] == "extra_forbidden":
            lines[f"unknown key {key!r} in {source}{suggest(str(path[-1]), _known_keys(model, path[:-1]))}"] = None
        elif complaint["type"] == "missing":
            lines[f"{source} lacks {key!r}"] = None
        else:
            message = complaint["msg"].removeprefix("Value error, ")
            given = complaint["input"]
            told = "" if isinstance(given, dict) or repr(given) in message else f", not {given!r}"
            lines[f"{source}: {key + ': ' if key else ''}{message}{told}"] = None
    return "\n".join(lines)


def _known_keys(model: type[BaseModel], path: list[Any]) -> list[str]:
    """The keys that are right where an unknown one stands."""
    if path and path[-1] in AXIS_TAGS:
        return ["choice", *RANGES]
    for part in path:
        if isinstance(part, int):  # an item of a list, whose field led to its model
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        nested = [
            kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def suggest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}" if known else ""
