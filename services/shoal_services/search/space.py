"""The space of a search: fields of a recipe, each a constant or an axis.

An axis is one of
    {choice: [a, b, c]}    {uniform: [low, high]}    {loguniform: [low, high]}    {randint: [low, high]}  (both ends in)
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Generic, Self, TypeVar, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from shoal.recipe import KINDS, Fit, Selection, Trained
from shoal.value import Value
from typing_extensions import TypeAliasType

from shoal_services.complaints import RANGES

T = TypeVar("T")


class Choice(Value, Generic[T]):
    """One of several values."""

    choice: list[T] = Field(min_length=1)


class Range(Value):
    """A value between two ends."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    randint: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _one_proper_range(self) -> Self:
        given = {name: getattr(self, name) for name in RANGES if getattr(self, name) is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of choice, {', '.join(RANGES)}")
        name, (low, high) = next(iter(given.items()))
        if low > high or (name == "loguniform" and low <= 0):
            raise ValueError(f"{name}: [{low}, {high}] is no range; give the lower end first" + (", above 0" * (low <= 0)))
        return self


def _check_kind(kind: object) -> object:
    """`linear`, `folded`, `dropped`, or `low_rank(64)`."""
    if isinstance(kind, str) and parse_kind(kind)[0] in KINDS:
        return kind
    raise ValueError(f"kind {kind!r} is none of linear, low_rank(RANK), folded, dropped")


def parse_kind(kind: str) -> tuple[str, int | None]:
    """`low_rank(64)` → ("low_rank", 64); other kinds have no rank."""
    found = re.fullmatch(r"(low_rank)\(([0-9]+)\)", kind)
    return (found[1], int(found[2])) if found else (kind, None)


def _tag_axis(value: object) -> str:
    """Which form an axis is written in, so that errors speak of that form alone."""
    if not isinstance(value, dict | Choice | Range):
        return "constant"
    keys = list(value) if isinstance(value, dict) else []
    is_choice = isinstance(value, Choice) or any(difflib.get_close_matches(str(key), ["choice"]) for key in keys)
    return "choice" if is_choice else "range"


KindName = Annotated[str, BeforeValidator(_check_kind)]
# A plain alias would leave T open in Choice[T]: only this form hands it on.
Axis = TypeAliasType(
    "Axis",
    Annotated[
        Annotated[T, Tag("constant")] | Annotated[Choice[T], Tag("choice")] | Annotated[Range, Tag("range")],
        Discriminator(_tag_axis),
    ],
    type_params=(T,),
)


class Space(Value):
    """The axes of the search: fields of `shoal.recipe.Recipe` and `Distillation`, each a constant or an axis."""

    num_replaced: Axis[int] = 0
    parameters: Axis[float | None] = None
    kv_cache: Axis[float | None] = None
    parts: Axis[bool] = False
    kind: Axis[KindName] = "linear"
    selection: Axis[Selection | None] = None
    fit: Axis[Fit] = "in_order"
    refit: Axis[bool] = True
    ridge: Axis[float | None] = None
    weight_share: Axis[float | None] = None
    sparsity: Axis[float | str | None] = None
    distillation_tokens: Axis[int] = Field(default=0, description="to learn from; 0 distils nothing")
    learning_rate: Axis[float | None] = Field(
        default=None, description="the highest; by default 1.5e-4, of all 1e-4, of maps and LoRA 5e-4"
    )
    temperature: Axis[float] = 1.0
    logit_kl: Axis[float] = 1.0
    layer_mse: Axis[float] = 0.0
    square_head: Axis[float] = 0.0
    cosine: Axis[float] = 0.0
    trained: Axis[Trained] = "blocks"
    lora_rank: Axis[int] = 32
    window: int = 512
    windows_per_step: Axis[int] = 2
    windows_per_pass: int = 4
    gradient_checkpointing: bool = False
    weight_decay: Axis[float] = 0.0
    patience: int | None = None
    seed: Axis[int] = 0

    @model_validator(mode="after")
    def _ranges_give_what_the_fields_take(self) -> Self:
        for name, axis in self.axes.items():
            inner = get_args(type(self).model_fields[name].annotation)[0]
            if isinstance(axis, Range) and not {int, float} & {inner, *get_args(inner)}:
                raise ValueError(f"{name} is no number; use choice")
            if isinstance(axis, Range) and inner is int and axis.randint is None:
                raise ValueError(f"{name} is a whole number; use randint or choice")
        return self

    @property
    def axes(self) -> dict[str, Choice | Range]:
        """The fields that vary."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if isinstance(value, Choice | Range)}

    @property
    def constants(self) -> dict[str, Any]:
        """The fields that do not."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in self.axes}

    @property
    def temperatures(self) -> tuple[float, ...]:
        """All temperatures that a trial can ask the dense model's targets for."""
        axis = self.temperature
        return tuple(sorted({1.0, *(list_ends(axis) if isinstance(axis, Choice | Range) else (axis,))}))

    @property
    def replaces_blocks(self) -> bool:
        """Whether some recipe of the space replaces blocks."""
        return bool(self.parameters or self.kv_cache or self.highest("num_replaced"))

    def highest(self, name: str) -> float:
        """The largest value that an axis or constant can take."""
        value = getattr(self, name)
        return max(list_ends(value)) if isinstance(value, Choice | Range) else value


def list_ends(axis: Choice | Range) -> list[Any]:
    """All values of a choice; both ends of a range."""
    if isinstance(axis, Choice):
        return axis.choice
    return [end for name in RANGES for end in getattr(axis, name) or ()]
