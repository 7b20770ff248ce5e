"""Every key of a search and of a pretraining as Markdown, from their schemas: `python tests/config_reference.py` renews
it in `tune_configs/README.md`.

A key without a description of its own takes that of the class above; one of a search's space that of the recipe's field
of the same name.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from shoal.recipe import Distillation, LossWeights, Recipe
from shoal_services.pretraining.config import PretrainConfig
from shoal_services.search.config import SearchConfig
from shoal_services.search.space import Space
from typing_extensions import TypeAliasType

README = Path(__file__).parents[1] / "tune_configs" / "README.md"
BEGIN, END = "<!-- made by tests/config_reference.py: begin -->\n", "<!-- made by tests/config_reference.py: end -->\n"
NAMES = {int: "whole number", float: "number", bool: "true, false", str: "text", Path: "folder", dict: "mapping"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
NO_BOUND = 2**31  # what only keeps a seed in a machine's word
HEADER = "| key | values | default | meaning |\n|---|---|---|---|\n"


def render() -> str:
    """The reference: a section for each kind of file, a table for each of its parts."""
    searches = "### Searches\n\n" + "".join(render_parts(SearchConfig))
    return f"{searches}### Pretraining\n\n" + "".join(render_parts(PretrainConfig))


def render_parts(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """The table of a model's keys, then those of the models inside."""
    title = f"`{path}`: " if path else ""
    says = " ".join((model.__doc__ or "").split())
    rows = "".join(render_row(model, name, field) for name, field in model.model_fields.items())
    yield f"{title}{says}\n\n{HEADER}{rows}\n"
    for name, field in model.model_fields.items():
        inner = find_model(field.annotation)
        if inner is not None:
            yield from render_parts(inner, f"{path}.{name}".lstrip("."))


def render_row(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    said = find_description(model, name)
    meaning = str(said.description).replace("None:", "none:")
    return f"| `{name}` | {name_values(model, name, said)} | {name_default(field)} | {meaning} |\n"


def find_description(model: type[BaseModel], name: str) -> FieldInfo:
    """The field that says what a key means. Raises ValueError where none does."""
    parents = [one for one in model.__mro__ if issubclass(one, BaseModel) and one is not BaseModel]
    for place in (*parents, Recipe, Distillation, LossWeights) if model is Space else parents:
        if name in place.model_fields and place.model_fields[name].description:
            return place.model_fields[name]
    raise ValueError(f"{model.__name__}.{name} has no description: give its field one")


def name_values(model: type[BaseModel], name: str, said: FieldInfo) -> str:
    """What may stand there, with the bounds of the field that describes it."""
    kind = model.model_fields[name].annotation
    if find_model(kind) is not None:
        return "see below"
    if name == "kind" and model is Space:
        return "linear, low_rank(RANK), folded, dropped"
    bounds = [f"{sign} {bound:g}" for sign, bound in list_bounds(said) if bound < NO_BOUND]
    constant = ["never an axis"] if model is Space and not is_axis(kind) else []
    return ", ".join(dict.fromkeys([*name_type(kind), *bounds, *constant]))


def list_bounds(said: FieldInfo) -> list[tuple[str, float]]:
    """The signs and numbers of a field's bounds."""
    return [(sign, getattr(rule, key)) for rule in said.metadata for key, sign in BOUNDS.items() if hasattr(rule, key)]


def name_type(kind: Any) -> list[str]:
    """The kinds of value that an annotation takes, in words; those of a literal one by one."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_axis(kind) or origin is Annotated:
        return name_type(inner[0])
    if origin is Literal:
        return [str(value) for value in inner]
    if origin in (Union, types.UnionType):
        return [word for one in inner if one is not type(None) for word in name_type(one)]
    if origin is tuple:
        return [f"list of {', '.join(name_type(inner[0]))}"]
    return [NAMES[origin or kind]]


def name_default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "needed"
    if isinstance(value, BaseModel):
        return ""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def find_model(kind: Any) -> type[BaseModel] | None:
    """The model in an annotation that is one, or may be none."""
    found = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel)]
    return found[0] if found else None


def is_axis(kind: Any) -> bool:
    """Whether an annotation is `shoal_services.search.space.Axis` of something."""
    return isinstance(get_origin(kind), TypeAliasType)


def renew(text: str) -> str:
    """A document with the reference between its two markers made again."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + render() + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(renew(README.read_text(encoding="utf-8")), encoding="utf-8")
