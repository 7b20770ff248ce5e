"""What to make (`Recipe`) and what came out (`Point`): frozen values that travel as JSON.

Nothing here says how a thing is run (workers, resources, paths), and nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Kind = Literal["linear", "low_rank", "folded", "dropped"]
Selection = Literal[
    "linearity", "linearity_in_sample", "linearity_without_residual", "cosine", "window", "greedy_kl", "listed"
]
Fit = Literal["in_order", "independent"]
Trained = Literal["maps", "lora", "all"]

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
PACKAGED_TEXT = "wikipedia-sample"
KINDS: tuple[Kind, ...] = ("linear", "low_rank", "folded", "dropped")


class Value(BaseModel):
    """A frozen value with a strict dict and JSON round trip: unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Text(Value):
    """A text that was used: where it came from, what exactly it was, how much of it."""

    name: str
    sha256: str | None = None
    num_tokens: int = Field(ge=1)


def _as_tuple(names: object) -> object:
    return (names,) if isinstance(names, str) else names


Sources = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class Texts(Value):
    """Where the texts come from (one source or several, see `shoal.text`) and how much of them is used.

    A source named both for training and for evaluation is shared out by documents.
    """

    train: Sources = (PACKAGED_TEXT,)
    evaluation: Sources = (PACKAGED_TEXT,)
    calibration_tokens: int = Field(default=32_768, ge=1)
    evaluation_tokens: int = Field(default=16_384, ge=1, description="of each evaluation text")
    selection_tokens: int = Field(default=4_096, ge=1, description="held out from training: for choices and early stops")
    window: int = Field(default=1024, ge=8, description="tokens per window in calibration and evaluation")


class LossWeights(Value):
    """Weights of the distillation losses; those with weight 0 are not computed."""

    logit_kl: float = Field(default=1.0, ge=0)
    layer_mse: float = Field(default=0.0, ge=0)
    square_head: float = Field(default=0.0, ge=0)
    cosine: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not any((self.logit_kl, self.layer_mse, self.square_head, self.cosine)):
            raise ValueError("every loss weight is 0; give at least one of logit_kl, layer_mse, square_head, cosine")
        return self

    @property
    def needs_hidden_states(self) -> bool:
        """Whether the teacher's hidden states are needed, and not its logits alone."""
        return bool(self.layer_mse or self.square_head or self.cosine)


class Distillation(Value):
    """How the replacements learn from the dense model."""

    num_tokens: int = Field(default=131_072, ge=1)
    learning_rate: float = Field(default=5e-4, gt=0)
    temperature: float = Field(default=1.0, gt=0)
    loss: LossWeights = LossWeights()
    trained: Trained = "lora"
    lora_rank: int = Field(default=32, ge=1)
    window: int = Field(default=512, ge=8)
    windows_per_step: int = Field(default=4, ge=1)
    windows_per_pass: int = Field(default=4, ge=1)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    patience: int | None = Field(default=None, ge=1, description="checks without improvement before an early stop")

    @property
    def num_steps(self) -> int:
        """Optimiser steps that use up `num_tokens`, at least one."""
        return max(1, self.num_tokens // (self.window * self.windows_per_step))


class Recipe(Value):
    """What to make of which model. `blocks` is filled in once they are chosen."""

    base_model: str
    revision: str | None = None
    weights_sha256: str | None = None
    num_replaced: int = Field(ge=0)
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    kind: Kind = "linear"
    rank: int | None = Field(default=None, ge=1)
    selection: Selection = "linearity"
    fit: Fit = "in_order"
    refit_down_proj: bool = True
    ridge: float | None = Field(default=None, ge=0, description="None: chosen on held-out tokens")
    calibration: tuple[Text, ...] = ()
    distillation_text: Text | None = None
    distillation: Distillation | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    dtype: str | None = None

    @field_validator("blocks")
    @classmethod
    def _sorted_and_unique(cls, blocks: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if blocks is not None and len(set(blocks)) != len(blocks):
            twice = sorted({block for block in blocks if blocks.count(block) > 1})
            raise ValueError(f"blocks lists {twice} more than once; name each block once")
        return None if blocks is None else tuple(sorted(blocks))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.blocks is not None and len(self.blocks) != self.num_replaced:
            raise ValueError(f"num_replaced={self.num_replaced} but blocks names {len(self.blocks)}: make them agree")
        if self.selection == "listed" and self.blocks is None:
            raise ValueError("selection='listed' needs blocks; name them or choose another selection")
        if (self.kind == "low_rank") != (self.rank is not None):
            raise ValueError(f"kind={self.kind!r} with rank={self.rank!r}: give rank with kind='low_rank', and only there")
        if self.kind in ("folded", "dropped") and self.distillation and self.distillation.trained == "maps":
            raise ValueError(f"kind={self.kind!r} leaves no maps to train; use trained='lora' or 'all'")
        if self.kind == "folded" and self.fit == "independent":
            raise ValueError("kind='folded' is fitted along the student's own stream; use fit='in_order'")
        return self

    @property
    def key(self) -> str:
        """A short name that is the same for equal recipes, on every machine."""
        return fingerprint(self.model_dump(mode="json"))


class Evaluation(Value):
    """Perplexity on one text beside the dense model's on the same tokens.

    `kl` is the mean divergence in nats per token of the compressed model from the dense one, over the dense
    model's top tokens and one bucket for the rest. `log_ratio` is log(perplexity / dense_perplexity): its
    standard error is of the paired difference and so much smaller than those of the two perplexities.
    """

    text: Text
    dense_perplexity: float
    dense_standard_error: float
    perplexity: float
    standard_error: float
    log_ratio: float
    log_ratio_standard_error: float
    kl: float
    kl_standard_error: float
    top1_agreement: float


class Size(Value):
    """What a model takes: parameters, bytes on disk, KV-cache bytes per token."""

    num_parameters: int
    num_bytes: int
    kv_bytes_per_token: int


class Speed(Value):
    """Median tokens per second, batch of one, measured in turns with the dense model."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


class Point(Value):
    """What came out of a recipe: a point of the size/quality plane."""

    recipe: Recipe
    evaluations: tuple[Evaluation, ...]
    size: Size
    dense_size: Size
    speed: Speed | None = None
    dense_speed: Speed | None = None
    seconds: dict[str, float] = {}
    device: str = "cpu"
    artefact: str | None = None
    artefact_sha256: str | None = None

    @property
    def perplexity(self) -> float:
        """Perplexity on the first evaluation text: the one that ranks."""
        return self.evaluations[0].perplexity

    @property
    def num_parameters(self) -> int:
        """Parameters of the compressed model."""
        return self.size.num_parameters


def fingerprint(value: object) -> str:
    """Twelve hexadecimal digits that identify a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
