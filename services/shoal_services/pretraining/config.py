"""The strict schema of `tune_configs/pretrain-*.yaml`: what to pretrain, with which regularisers, and how it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from shoal.paper.pretrain_recipe import (
    Architecture,
    Pretraining,
    PretrainRecipe,
    PretrainTexts,
    Regularizer,
    RegularizerKind,
    require_not_negative,
)
from shoal.value import Value

from shoal_services.complaints import read_strict
from shoal_services.training.workers import Workers, resolve


class Sweep(Value):
    """The weights λ of each kind of regulariser, each trained with every seed; λ = 0 is trained in any case."""

    cosine: tuple[float, ...] = Field(default=(), description="weights λ of the cosine regulariser")
    mse: tuple[float, ...] = Field(default=(), description="weights λ of the MSE regulariser")
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1, description="each regulariser is trained with all")

    @field_validator("cosine", "mse")
    @classmethod
    def _not_negative(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(require_not_negative(weight) for weight in weights)

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            raise ValueError(f"seeds lists {twice} more than once: the same run twice is no second measurement")
        return seeds

    @property
    def regularizers(self) -> list[Regularizer]:
        """None first, then by kind and weight, each once."""
        kinds: dict[RegularizerKind, tuple[float, ...]] = {"cosine": self.cosine, "mse": self.mse}
        found = [Regularizer.of(kind, weight) for kind, weights in kinds.items() for weight in sorted(weights)]
        return list(dict.fromkeys([Regularizer(), *found]))


class PretrainRun(Workers):
    """How a sweep is run. `keep_checkpoints` keeps the model at every check, for `shoal profile`."""

    keep_checkpoints: bool = Field(default=False, description="one model a check")
    step_limit_s: float = Field(default=1800, gt=0, description="of training; a worker that takes longer is started again")


class PretrainConfig(Value):
    """One sweep: a file `pretrain-….yaml` of `tune_configs/`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the sweep: its folder and MLflow experiment")
    architecture: Architecture = Field(description="the model's sizes")
    texts: PretrainTexts = Field(default=PretrainTexts(), description="what is read")
    training: Pretraining = Field(description="how it learns")
    dtype: Literal["bfloat16", "float32"] | None = Field(
        default=None, description="None: bfloat16 where the hardware multiplies it, else float32"
    )
    sweep: Sweep = Field(default=Sweep(), description="which regularisers, with which seeds")
    run: PretrainRun = Field(default=PretrainRun(), description="where and with how much; changes nothing that comes out")

    @model_validator(mode="after")
    def _recipes_are_possible(self) -> PretrainConfig:
        for assignment in self.assignments():
            self.make_recipe(assignment)
        return self

    @property
    def folder(self) -> Path:
        """Where the sweep keeps everything."""
        return (self.run.storage / self.name).expanduser().resolve()

    def resolved(self) -> Self:
        """The same with paths that hold for every worker."""
        return self.model_copy(update={"texts": resolve(self.texts, "train", "validation", "tokenizer")})

    def assignments(self) -> list[dict[str, Any]]:
        """Every run of the sweep, seed by seed: whole comparisons come first."""
        return [
            {"kind": one.kind, "weight": one.weight, "seed": seed}
            for seed in self.sweep.seeds
            for one in self.sweep.regularizers
        ]

    def make_recipe(self, assignment: dict[str, Any]) -> PretrainRecipe:
        """The recipe of one run."""
        return PretrainRecipe(
            architecture=self.architecture, texts=self.texts, training=self.training, dtype=self.dtype,
            regularizer=Regularizer.of(assignment["kind"], assignment["weight"]), seed=assignment["seed"],
        )  # fmt: skip

    def trial_key(self, assignment: dict[str, Any]) -> str:
        """The name of a run: equal for equal recipes, so that none is trained twice."""
        return self.make_recipe(assignment).key

    @property
    def science(self) -> dict[str, Any]:
        """The part that decides what comes out."""
        return self.model_dump(mode="json", exclude={"run"})


def load_pretrain_config(path: Path) -> PretrainConfig:
    """The sweep that a YAML file describes. Raises ValueError that names file, key and remedy."""
    return read_strict(path, PretrainConfig, example="tune_configs/pretrain-tiny.yaml")
