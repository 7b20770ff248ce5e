"""What to fine-tune on what, how often, and on which text linearity is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator
from shoal.checkpoints.load import load_tokenizer
from shoal.paper.finetune import Examples, Finetuning
from shoal.text.labelled import load_labelled, load_preferences
from shoal.texts import Texts
from shoal.value import Value

from shoal_services.training.workers import Workers, resolve


class FinetuneConfig(Value):
    """One model on one dataset, with several seeds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str
    revision: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    data: str
    task: Literal["classification", "preference"] = "classification"
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    finetuning: Finetuning = Finetuning()
    texts: Texts = Texts()
    run: Workers = Workers()

    @field_validator("run")
    @classmethod
    def _fixed_size(cls, run: Workers) -> Workers:
        if run.most_workers > run.num_workers:
            raise ValueError(
                f"num_workers must be one number here, not up to {run.most_workers}: workers share a batch evenly"
            )
        return run

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds={list(seeds)} names one twice: the same run twice is no second measurement")
        return seeds

    @property
    def folder(self) -> Path:
        """Where everything is kept."""
        return (self.run.storage / self.name).expanduser().resolve()

    @property
    def science(self) -> dict[str, Any]:
        """The part that decides what comes out."""
        return self.model_dump(mode="json", exclude={"run"})

    def resolved(self) -> Self:
        """The same with paths that hold for every worker."""
        return resolve(self.model_copy(update={"texts": resolve(self.texts, "train", "evaluation")}), "model", "data")

    def assignments(self) -> list[dict[str, Any]]:
        """Every run: a seed."""
        return [{"seed": seed} for seed in self.seeds]

    def trial_key(self, assignment: dict[str, Any]) -> str:
        """The name of a run."""
        return f"seed-{assignment['seed']}"

    def load_examples(self) -> tuple[Examples, Examples]:
        """(training, held out), the same for every seed. Raises ValueError for data that cannot be learned from."""
        share = self.finetuning.held_out_share
        if self.task == "preference":
            return load_preferences(self.data, load_tokenizer(self.model, revision=self.revision)).split(share)
        return load_labelled(self.data, text_columns=self.text_columns, label_column=self.label_column).split(share)
