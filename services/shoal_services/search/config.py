"""The strict schema of `tune_configs/*.yaml`: what to search (`space`, `search`) and how to run it (`run`)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from shoal.recipe import Distillation, LossWeights, Recipe
from shoal.texts import Texts
from shoal.value import Value

from shoal_services.complaints import read_strict, suggest
from shoal_services.search.space import Choice, Range, Space, list_ends, parse_kind
from shoal_services.training.workers import Workers, resolve


class Search(Value):
    """How the space is searched.

    `grid` tries each entry of `start_with` with every combination of the remaining choices; `optuna` tries
    `start_with` first and then samples (TPE, two objectives: held-out perplexity and parameters).
    A trial whose perplexity is above `max_perplexity_ratio` times the dense model's has collapsed. A trial is
    stopped early if a finished one is no larger and its held-out perplexity is `hopeless_ratio` times lower.
    """

    algorithm: Literal["optuna", "grid"] = Field(default="optuna", description="sampled, or every combination")
    num_trials: int = Field(default=20, ge=1, description="recipes that optuna tries; a grid tries all")
    start_with: tuple[dict[str, Any], ...] = Field(default=(), description="values of axes to begin with")
    max_perplexity_ratio: float = Field(
        default=20.0, gt=1, description="to the dense model: above it a trial has collapsed"
    )
    hopeless_ratio: float = Field(default=1.5, gt=1, description="to a better trial: above it a trial is stopped")
    seed: int = Field(default=0, description="of the sampler")


class Run(Workers):
    """How a search is run. `keep_models` deletes the weights of trials that are off the frontier, unless a registry names
    them, or keeps all.

    `streamed` is for models larger than a worker's memory: blocks stay on disk, and where a trial distils, its workers
    share the weights of student and teacher out among them.
    """

    keep_models: Literal["frontier", "all"] = Field(default="frontier", description="whose weights stay on disk")
    streamed: bool = Field(default=False, description="blocks stay on disk; workers that distil share the weights out")
    step_limit_s: float = Field(default=1800, gt=0, description="of training; a worker that takes longer is started again")
    checkpoint_every_s: float = Field(default=60, ge=0, description="at the next check after that")


class Tasks(Value):
    """lm-eval tasks, task files or folders of them, that every finished model is measured in."""

    names: tuple[str, ...] = Field(min_length=1, description="of lm-eval, or paths")
    limit: int | None = Field(default=None, ge=2, description="examples of each task at most")


class SearchConfig(Value):
    """One search: a file of `tune_configs/`."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the search: its folder, MLflow experiment and job"
    )
    model: str = Field(description="the dense model: alias, Hub id, folder or .gguf file")
    revision: str | None = Field(default=None, description="branch, tag or commit on the Hub")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        default=None, description="None: bfloat16 where the hardware multiplies it, else float16 on a GPU, float32 on a CPU"
    )
    texts: Texts = Field(default=Texts(), description="what is read")
    tasks: Tasks | None = Field(default=None, description="what else is measured (pip install 'shoal[tasks]')")
    space: Space = Field(description="what varies")
    search: Search = Field(default=Search(), description="how it is searched")
    run: Run = Field(default=Run(), description="where and with how much; changes nothing that comes out")

    @field_validator("search")
    @classmethod
    def _known_axes(cls, search: Search, info: Any) -> Search:
        for entry in search.start_with:
            for key in entry:
                if key not in Space.model_fields:
                    raise ValueError(f"start_with: unknown key {key!r}{suggest(key, Space.model_fields)}")
        return search

    @model_validator(mode="after")
    def _recipes_are_possible(self) -> Self:
        """Every corner that can be written down becomes a recipe here, not an hour into the search."""
        first = {name: list_ends(axis)[0] for name, axis in self.space.axes.items()}
        corners = [{**first, name: value} for name, axis in self.space.axes.items() for value in list_ends(axis)]
        for assignment in [first, *corners, *self.starting_assignments()]:
            self._check_recipe({**first, **assignment})
        self._check_streamed()
        if self.search.algorithm == "optuna":
            self._check_starts()
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
        if not recipe.replaces_blocks and self.space.weight_share is None and self.space.sparsity is None:
            raise ValueError(
                "space.num_replaced must be 1 or more, or space.parameters below 1; the dense model is measured in any "
                "case (0 is for spaces with weight_share or sparsity)"
            )

    def _check_starts(self) -> None:
        """The sampler would leave out what it does not know, without a word."""
        for name, value in ((name, value) for entry in self.search.start_with for name, value in entry.items()):
            axis = self.space.axes.get(name)
            if axis is None:
                raise ValueError(f"start_with: {name} does not vary in this space; leave it out, or make it a choice")
            ends = list_ends(axis)
            if not (value in ends if isinstance(axis, Choice) else ends[0] <= value <= ends[-1]):
                raise ValueError(
                    f"start_with: {name}: {value!r} is not in the space, which has {axis.model_dump(exclude_none=True)}"
                )

    def _check_streamed(self) -> None:
        if not self.run.streamed:
            return
        if self.tasks is not None:
            raise ValueError(
                "run.streamed: a task would read the whole model from disk for every batch; leave tasks out, and measure "
                "the stored models with `shoal evaluate --tasks` where one fits in memory"
            )
        selection = self.space.selection
        has_budget = self.space.parameters is not None or self.space.kv_cache is not None
        if has_budget or "kl" in (selection.choice if isinstance(selection, Choice) else [selection]):
            raise ValueError(
                "run.streamed: selection kl, and budgets, would read the model from disk for every set of blocks tried; "
                "leave them out"
            )
        for name in ("sparsity", "weight_share"):
            if getattr(self.space, name) is not None:
                raise ValueError(f"run.streamed: a streamed model cannot be made sparse or factored; leave out {name}")

    def run_with(self, **given: Any) -> Self:
        """The same search, run otherwise: fields of `run` that are not None replace the file's."""
        return self.model_copy(update={"run": self.run.given(**given)})

    def resolved(self) -> Self:
        """The same with paths that hold for every worker."""
        parts = {"texts": resolve(self.texts, "train", "evaluation"), "tasks": self.tasks and resolve(self.tasks, "names")}
        return resolve(self.model_copy(update=parts), "model")

    @property
    def folder(self) -> Path:
        """Where the search keeps everything."""
        return (self.run.storage / self.name).expanduser().resolve()

    @property
    def num_trials(self) -> int:
        if self.search.algorithm == "optuna":
            return self.search.num_trials
        return len({self.trial_key(assignment) for assignment in self.starting_assignments()})

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
        shared = {name: values[name] for name in Recipe.model_fields if name in values}
        fixed = {"base_model": self.model, "revision": self.revision, "dtype": self.dtype, "kind": kind, "rank": rank}
        # Settled here, so that the key of a trial says by which rule its blocks are chosen.
        return Recipe.model_validate(shared | fixed | {"distillation": settings}).settle(streamed=self.run.streamed)

    def trial_key(self, assignment: dict[str, Any]) -> str:
        """The name of a trial: equal for equal recipes, so that none is made twice."""
        return self.make_recipe(assignment).key

    @property
    def science(self) -> dict[str, Any]:
        """The part that decides what comes out; two searches of one name must agree in it."""
        return self.model_dump(mode="json", exclude={"run"})


def load_config(path: Path) -> SearchConfig:
    """The search that a YAML file describes. Raises ValueError that names file, key and remedy."""
    return read_strict(path, SearchConfig, example="tune_configs/demo.yaml")
