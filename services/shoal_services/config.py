"""The strict schema of `tune_configs/*.yaml`: what to search (`space`, `search`) and how to run it (`run`).

An axis of the space is a constant, or one of
    {choice: [a, b, c]}    {uniform: [low, high]}    {loguniform: [low, high]}    {randint: [low, high]}  (both ends in)
"""

from __future__ import annotations

import difflib
import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from shoal.recipe import KINDS, Distillation, Fit, LossWeights, Recipe, Selection, Texts, Trained, Value
from typing_extensions import TypeAliasType

T = TypeVar("T")
RANGES = ("uniform", "loguniform", "randint")
AXIS_TAGS = ("constant", "choice", "range")


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

    num_replaced: Axis[int]
    kind: Axis[KindName] = "linear"
    selection: Axis[Selection] = "linearity"
    fit: Axis[Fit] = "in_order"
    refit_down_proj: Axis[bool] = True
    ridge: Axis[float | None] = None
    distillation_tokens: Axis[int] = 0
    learning_rate: Axis[float] = 5e-4
    temperature: Axis[float] = 1.0
    logit_kl: Axis[float] = 1.0
    layer_mse: Axis[float] = 0.0
    square_head: Axis[float] = 0.0
    cosine: Axis[float] = 0.0
    trained: Axis[Trained] = "lora"
    lora_rank: Axis[int] = 32
    window: int = 512
    windows_per_step: Axis[int] = 4
    windows_per_pass: int = 4
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
        return tuple(sorted({1.0, *(_ends(axis) if isinstance(axis, Choice | Range) else (axis,))}))

    def highest(self, name: str) -> float:
        """The largest value that an axis or constant can take."""
        value = getattr(self, name)
        return max(_ends(value)) if isinstance(value, Choice | Range) else value


class Search(Value):
    """How the space is searched.

    `grid` tries each entry of `start_with` with every combination of the remaining choices; `optuna` tries
    `start_with` first and then samples (TPE, two objectives: held-out perplexity and parameters).
    A trial whose perplexity is above `max_perplexity_ratio` times the dense model's has collapsed. A trial is
    stopped early if a finished one is no larger and its held-out perplexity is `hopeless_ratio` times lower.
    """

    algorithm: Literal["optuna", "grid"] = "optuna"
    num_trials: int = Field(default=20, ge=1)
    start_with: tuple[dict[str, Any], ...] = ()
    max_perplexity_ratio: float = Field(default=20.0, gt=1)
    hopeless_ratio: float = Field(default=1.5, gt=1)
    seed: int = 0


class Run(Value):
    """How it is run: none of this changes what comes out.

    `max_concurrent_trials` is what the cluster's CPUs and GPUs hold, if not given. `keep_models` deletes the weights
    of trials that are off the frontier, or keeps all. `storage` must be shared if the cluster has several nodes.
    """

    num_workers: int = Field(default=1, ge=1, description="Ray Train workers per trial")
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    max_concurrent_trials: int | None = Field(default=None, ge=1)
    max_failures: int = Field(default=2, ge=0, description="restarts of a trial whose workers die")
    keep_models: Literal["frontier", "all"] = "frontier"
    storage: Path = Path("shoal-runs")
    tracking_uri: str | None = None
    address: str | None = None


class SearchConfig(Value):
    """One search: a file of `tune_configs/`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str
    revision: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    texts: Texts = Texts()
    space: Space
    search: Search = Search()
    run: Run = Run()

    @field_validator("search")
    @classmethod
    def _known_axes(cls, search: Search, info: Any) -> Search:
        for entry in search.start_with:
            for key in entry:
                if key not in Space.model_fields:
                    raise ValueError(f"start_with: unknown key {key!r}{_suggest(key, Space.model_fields)}")
        return search

    @model_validator(mode="after")
    def _recipes_are_possible(self) -> Self:
        """Every corner that can be written down becomes a recipe here, not an hour into the search."""
        first = {name: _ends(axis)[0] for name, axis in self.space.axes.items()}
        corners = [{**first, name: value} for name, axis in self.space.axes.items() for value in _ends(axis)]
        for assignment in [first, *corners, *self.starting_assignments()]:
            self._check_recipe({**first, **assignment})
        if self.search.algorithm == "grid" and any(isinstance(axis, Range) for axis in self.space.axes.values()):
            raise ValueError("algorithm='grid' needs every axis to be a choice or a constant; or use algorithm='optuna'")
        return self

    def _check_recipe(self, assignment: dict[str, Any]) -> None:
        try:
            recipe = self.make_recipe(assignment)
        except ValidationError as error:
            complaint = error.errors()[0]
            key = ".".join(str(part) for part in complaint["loc"])
            message = f"{key}: " * bool(key) + complaint["msg"].removeprefix("Value error, ")
            varied = {name: value for name, value in assignment.items() if name in self.space.axes}
            raise ValueError(f"no recipe for {varied or 'this space'}: {message}") from error
        if recipe.num_replaced < 1:
            raise ValueError("space.num_replaced must be 1 or more; the dense model is measured in any case")

    @property
    def folder(self) -> Path:
        """Where the search keeps everything."""
        return (self.run.storage / self.name).expanduser().resolve()

    @property
    def num_trials(self) -> int:
        return len(self.starting_assignments()) if self.search.algorithm == "grid" else self.search.num_trials

    def starting_assignments(self) -> list[dict[str, Any]]:
        """The first assignments: of axes alone under `optuna`, whole ones under `grid`."""
        if self.search.algorithm == "optuna":
            return [dict(entry) for entry in self.search.start_with]
        grid = []
        for entry in self.search.start_with or ({},):
            free = {k: axis.choice for k, axis in self.space.axes.items() if k not in entry and isinstance(axis, Choice)}
            for values in itertools.product(*free.values()):
                grid.append({**self.space.constants, **entry, **dict(zip(free, values, strict=True))})
        return grid

    def make_recipe(self, assignment: dict[str, Any]) -> Recipe:
        """The recipe that an assignment of the axes stands for. Raises ValueError if it contradicts itself."""
        values = {**self.space.constants, **assignment}
        kind, rank = parse_kind(values["kind"])
        settings = None
        if values["distillation_tokens"] > 0:
            loss = LossWeights(**{name: values[name] for name in LossWeights.model_fields})
            own = {name: values[name] for name in Distillation.model_fields if name in values}
            settings = Distillation(num_tokens=values["distillation_tokens"], loss=loss, **own)
        shared = {name: values[name] for name in ("num_replaced", "selection", "fit", "refit_down_proj", "ridge", "seed")}
        return Recipe.model_validate(
            {"base_model": self.model, "revision": self.revision, "dtype": self.dtype, "kind": kind, "rank": rank}
            | shared
            | {"distillation": settings}
        )

    def trial_key(self, assignment: dict[str, Any]) -> str:
        """The name of a trial: equal for equal recipes, so that none is made twice."""
        return self.make_recipe(assignment).key

    @property
    def science(self) -> dict[str, Any]:
        """The part that decides what comes out; two searches of one name must agree in it."""
        return self.model_dump(mode="json", exclude={"run"})


def _ends(axis: Choice | Range) -> list[Any]:
    """All values of a choice; both ends of a range."""
    if isinstance(axis, Choice):
        return axis.choice
    return [end for name in RANGES for end in getattr(axis, name) or ()]


def read_assignment(config: dict[str, Any]) -> dict[str, Any]:
    """The assignment in a Tune trial's configuration: nested by `grid`, under flat names by Optuna."""
    if "assignment" in config:
        return dict(config["assignment"])
    return {name.removeprefix("assignment/"): value for name, value in config.items() if name.startswith("assignment/")}


def load_config(path: Path) -> SearchConfig:
    """The search that a YAML file describes. Raises ValueError that names file, key and remedy."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{str(path)!r} holds no mapping; see tune_configs/demo.yaml for the form")
    try:
        return SearchConfig.model_validate(data)
    except ValidationError as error:
        raise ValueError(explain_validation(error, SearchConfig, path.name)) from error


def explain_validation(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """All of a validation error's complaints, one a line, each with key, value and the nearest known key."""
    lines: dict[str, None] = {}
    for complaint in error.errors():
        path = list(complaint["loc"])
        key = ".".join(str(part) for part in path if part not in AXIS_TAGS)
        if complaint["type"] == "extra_forbidden":
            lines[f"unknown key {key!r} in {source}{_suggest(str(path[-1]), _known_keys(model, path[:-1]))}"] = None
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
        nested = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(nested, type) and issubclass(nested, BaseModel)):
            return []
        model = nested
    return list(model.model_fields)


def _suggest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}" if known else ""
