"""What to pretrain: frozen values that travel as JSON, and nothing about how it is run. No torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from shoal.recipe import Steps
from shoal.texts import PACKAGED_TEXT, Sources
from shoal.value import Value, fingerprint

RegularizerKind = Literal["none", "cosine", "mse"]


def require_not_negative(weight: float) -> float:
    """Raises ValueError for a λ below 0: the blocks would be paid to tear the stream apart, and the loss has no floor."""
    if weight < 0:
        raise ValueError(f"λ is {weight:g}; a regulariser's weight must be 0 (none) or more")
    return weight


class Regularizer(Value):
    """Kind and weight λ of the penalty on what blocks change (see `regularize`). At λ = 0 all kinds are none."""

    kind: RegularizerKind = "none"
    weight: float = 0.0

    @field_validator("weight")
    @classmethod
    def _not_negative(cls, weight: float) -> float:
        return require_not_negative(weight)

    @model_validator(mode="after")
    def _one_name_for_none(self) -> Self:
        if (self.kind == "none") != (self.weight == 0):
            raise ValueError(f"kind={self.kind!r} with weight={self.weight:g}: λ = 0 is kind='none', and no other is")
        return self

    @classmethod
    def of(cls, kind: RegularizerKind, weight: float) -> Self:
        """The regulariser of a kind and weight; at weight 0 it is none, whatever the kind."""
        return cls(kind=kind if weight else "none", weight=weight)

    @property
    def label(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind} {self.weight:g}"


class Architecture(Value):
    """A decoder as `transformers.MistralConfig` names its sizes; the vocabulary's comes from the tokenizer."""

    hidden_size: int = Field(ge=8, description="width of the residual stream")
    intermediate_size: int = Field(ge=8, description="width inside the MLP")
    num_hidden_layers: int = Field(ge=2, description="blocks")
    num_attention_heads: int = Field(ge=1, description="a divisor of hidden_size")
    num_key_value_heads: int = Field(ge=1, description="a divisor of num_attention_heads")
    max_position_embeddings: int = Field(default=1024, ge=8, description="context in tokens")
    sliding_window: int | None = Field(default=None, ge=1, description="tokens that attention looks back; none: all")
    rope_theta: float = Field(default=10_000.0, gt=0, description="base of the rotary positions")
    tie_word_embeddings: bool = Field(default=True, description="whether the LM head is the embedding")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        for whole, part in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole}={getattr(self, whole)} is no multiple of {part}={getattr(self, part)}")
        return self


class PretrainTexts(Value):
    """Where the texts come from, and the tokenizer: `tokenizer` by name or folder, or one of `vocab_size` tokens is made.

    A source named both for training and for validation is shared out by documents. Linearity is measured on text of the
    training sources that is not trained on.
    """

    train: Sources = Field(default=(PACKAGED_TEXT,), description="to learn from")
    validation: Sources = Field(default=(PACKAGED_TEXT,), description="to measure perplexity on")
    validation_tokens: int = Field(default=65_536, ge=1, description="of all validation texts together")
    linearity_tokens: int = Field(default=65_536, ge=1, description="held out from training, to score the blocks on")
    tokenizer: str | None = Field(default=None, description="a name or folder; none: one is made of the training text")
    vocab_size: int = Field(default=4096, ge=258, description="of the tokenizer that is made: 256 bytes, the end, merges")


class Pretraining(Steps):
    """How the weights are learned, and how often it is looked at what has been learned."""

    num_tokens: int = Field(ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    windows_per_step: int = Field(default=32, ge=1)
    windows_per_pass: int = Field(default=8, ge=1)
    weight_decay: float = Field(default=0.1, ge=0)
    num_checks: int = Field(default=8, ge=1, description="of validation perplexity and linearity, after the first")

    @property
    def check_every(self) -> int:
        """Steps from one check to the next."""
        return max(1, self.num_steps // self.num_checks)


class PretrainRecipe(Value):
    """What to make: architecture, texts, training, regulariser, and the seed of weights and order of windows."""

    architecture: Architecture
    texts: PretrainTexts = PretrainTexts()
    training: Pretraining
    dtype: Literal["bfloat16", "float32"] | None = None
    regularizer: Regularizer = Regularizer()
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        context = self.architecture.max_position_embeddings
        if self.training.window > context:
            raise ValueError(
                f"training.window={self.training.window} is longer than architecture.max_position_embeddings={context}; "
                "make them agree"
            )
        return self

    @property
    def key(self) -> str:
        """A short name that is the same for equal recipes, on every machine."""
        return fingerprint(self.model_dump(mode="json"))
