"""What to make (`Recipe`) and what came out (`Point`): frozen values that travel as JSON.

Nothing here says how a thing is run (workers, resources, paths), and nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Kind = Literal["linear", "low_rank", "folded", "dropped"]
Selection = Literal[
    "linearity", "linearity_in_sample", "linearity_without_residual", "cosine", "window", "greedy_kl", "listed"
]
Fit = Literal["in_order", "independent"]
Trained = Literal["maps", "lora", "all"]

Sparsity = float | Literal["2:4", "4:8"]

TEXT_FORMATS = (".txt", ".jsonl", ".json", ".parquet")
# Of text and JSON; parquet is packed inside.
PACKED = (".gz", ".zst", ".bz2", ".xz")
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


def text_format(source: str) -> str | None:
    """Which of `TEXT_FORMATS` the name of a local file says, packed or not; None for other sources."""
    path = PurePath(source.lower())
    is_packed = path.suffix in PACKED
    name = path.stem if is_packed else path.name
    suffix = PurePath(name).suffix
    return suffix if suffix in TEXT_FORMATS and not (is_packed and suffix == ".parquet") else None


def _as_tuple(names: object) -> object:
    return (names,) if isinstance(names, str) else names


Sources = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class Texts(Value):
    """Where the texts come from (one source or several, see `shoal.text.sources`) and how much of them is used.

    A source named both for training and for evaluation is shared out by documents.
    """

    train: Sources = Field(default=(PACKAGED_TEXT,), description="to calibrate, distil and choose on")
    evaluation: Sources = Field(default=(PACKAGED_TEXT,), description="to report on; the first one ranks")
    calibration_tokens: int | None = Field(default=None, ge=1, description="None: what the model's width asks for")
    evaluation_tokens: int = Field(default=16_384, ge=1, description="of each evaluation text")
    selection_tokens: int = Field(default=4_096, ge=1, description="held out from training: for choices and early stops")
    window: int = Field(default=1024, ge=8, description="tokens per window in calibration and evaluation")

    def find_calibration_tokens(self, width: int) -> int:
        """Tokens to calibrate a model of this width on: as given, or 16 per dimension and at least 32,768."""
        return self.calibration_tokens or max(32_768, 16 * width)


class LossWeights(Value):
    """Weights of the distillation losses; those with weight 0 are not computed."""

    logit_kl: float = Field(default=1.0, ge=0, description="weight: KL from the dense model's next-token distribution")
    layer_mse: float = Field(default=0.0, ge=0, description="weight: squared error of the stream, summed over layers")
    square_head: float = Field(default=0.0, ge=0, description="weight: the same over the stream's energy, mean over layers")
    cosine: float = Field(default=0.0, ge=0, description="weight: 1 − cosine of the streams")

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not any((self.logit_kl, self.layer_mse, self.square_head, self.cosine)):
            raise ValueError("every loss weight is 0; give at least one of logit_kl, layer_mse, square_head, cosine")
        return self

    @property
    def needs_hidden_states(self) -> bool:
        """Whether the teacher's hidden states are needed, and not its logits alone."""
        return bool(self.layer_mse or self.square_head or self.cosine)


class Steps(Value):
    """How weights are trained: AdamW over token windows, a linear warm-up and a cosine to zero."""

    num_tokens: int = Field(default=131_072, ge=1, description="to learn from")
    learning_rate: float = Field(default=5e-4, gt=0, description="the highest, after the warm-up")
    window: int = Field(default=512, ge=8, description="tokens per training window")
    windows_per_step: int = Field(default=4, ge=1, description="the batch of an optimiser step")
    windows_per_pass: int = Field(default=4, ge=1, description="of those, how many at once; fewer take less memory")
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1, description="share of the steps that warm up")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's")
    max_gradient_norm: float = Field(default=1.0, gt=0, description="longer gradients are shortened to it")
    gradient_checkpointing: bool = Field(default=False, description="less memory: blocks run again on the way back")

    @property
    def num_steps(self) -> int:
        """Optimiser steps that use up `num_tokens`, at least one."""
        return max(1, self.num_tokens // (self.window * self.windows_per_step))


class Distillation(Steps):
    """How the replacements learn from the dense model."""

    temperature: float = Field(default=1.0, gt=0, description="of both distributions in logit_kl")
    loss: LossWeights = LossWeights()
    trained: Trained = Field(default="lora", description="which weights learn: maps alone, maps and LoRA factors, or all")
    lora_rank: int = Field(default=32, ge=1, description="of the LoRA factors")
    patience: int | None = Field(default=None, ge=1, description="checks without improvement before an early stop")


def read_sparsity(value: object) -> object:
    """A share of zeros between 0 and 1, "2:4" or "4:8"; None for a share of 0. Raises ValueError for anything else."""
    if value is None or value in ("2:4", "4:8"):
        return value
    try:
        share = float(str(value))
    except ValueError:
        share = -1.0
    if isinstance(value, bool) or not 0 <= share < 1:
        hint = "; YAML reads 2:4 as 124 unless it is in quotes" if value in (124, 248) else ""
        raise ValueError(f"sparsity={value!r} is neither a share of zeros from 0 to below 1 nor '2:4' or '4:8'{hint}")
    return share or None  # a share of 0 is no sparsity: one recipe, one key


class Recipe(Value):
    """What to make of which model. `blocks` is filled in once they are chosen.

    `weight_share` and `sparsity` are for the projections of the blocks that stay: the share of their parameters that
    low-rank factors keep, and the share of their weights that are zero ("2:4": 2 of each 4 stay).
    """

    base_model: str
    revision: str | None = None
    weights_sha256: str | None = None
    num_replaced: int = Field(ge=0, description="blocks that go")
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    kind: Kind = Field(default="linear", description="what stands in for a run of replaced blocks")
    rank: int | None = Field(default=None, ge=1)
    selection: Selection = Field(default="linearity", description="how blocks are chosen; listed is not for searches")
    fit: Fit = Field(default="in_order", description="maps on the student's own stream, or each on the dense model's")
    refit_down_proj: bool = Field(default=True, description="fit `down_proj` of kept blocks again in the same walk")
    ridge: float | None = Field(default=None, ge=0, description="None: chosen on held-out tokens")
    weight_share: float | None = Field(default=None, gt=0, lt=1, description="of parameters that SVD factors keep")
    sparsity: Annotated[Sparsity | None, BeforeValidator(read_sparsity)] = Field(
        default=None, description="zeros by Wanda: a share below 1, '2:4' or '4:8'"
    )
    calibration: tuple[Text, ...] = ()
    distillation_text: Text | None = None
    distillation: Distillation | None = None
    seed: int = Field(default=0, ge=0, lt=2**63, description="of new weights and the order of windows")
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
        no_maps = self.kind in ("folded", "dropped") or not self.num_replaced
        if no_maps and self.distillation and self.distillation.trained == "maps":
            what = f"kind={self.kind!r}" if self.num_replaced else "num_replaced=0"
            raise ValueError(f"{what} leaves no maps to train; use trained='lora' or 'all'")
        if self.kind == "folded" and self.fit == "independent":
            raise ValueError("kind='folded' is fitted along the student's own stream; use fit='in_order'")
        return self

    @property
    def changes(self) -> str:
        """What is done to the dense model, in a few words: "4 blocks folded, 2:4 sparse"."""
        kind = self.kind + (f"({self.rank})" if self.rank else "")
        parts = [f"{self.num_replaced} blocks {kind}"] if self.num_replaced or not self.weight_changes else []
        return ", ".join([*parts, *self.weight_changes])

    @property
    def weight_changes(self) -> tuple[str, ...]:
        """What is done to the weights of the blocks that stay: "SVD 80 %", "50 % sparse", "2:4 sparse"."""
        factored = () if self.weight_share is None else (f"SVD {100 * self.weight_share:g} %",)
        if self.sparsity is None:
            return factored
        return (*factored, f"{self.sparsity if isinstance(self.sparsity, str) else f'{100 * self.sparsity:g} %'} sparse")

    @property
    def training_texts(self) -> list[str]:
        """Names of the texts that the model was calibrated on."""
        return [name for text in self.calibration for name in text.name.split(" + ")]

    @property
    def short_name(self) -> str:
        """The same as part of a name: "folded-4-sparse2of4"."""
        parts = [f"{self.kind}-{self.num_replaced}"] if self.num_replaced or not self.weight_changes else []
        if self.weight_share is not None:
            parts.append(f"svd{100 * self.weight_share:g}")
        if self.sparsity is not None:
            share = self.sparsity.replace(":", "of") if isinstance(self.sparsity, str) else f"{100 * self.sparsity:g}"
            parts.append(f"sparse{share}")
        return "-".join(parts)

    @property
    def is_stock(self) -> bool:
        """Whether the model is of a stock architecture, which loads with nobody's code."""
        return self.weight_share is None and (self.kind in ("folded", "dropped") or not self.num_replaced)

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


class TaskScore(Value):
    """A model's score in a task, beside the dense model's on the same examples where one was measured.

    Standard errors are None where the task's metric has none; that of `difference` (score − dense score) is of the
    paired difference, None where the metric is no mean over examples.
    """

    task: str
    metric: str
    num_examples: int
    score: float
    standard_error: float | None = None
    dense_score: float | None = None
    dense_standard_error: float | None = None
    difference_standard_error: float | None = None

    @property
    def difference(self) -> float | None:
        """How far the score is from the dense model's."""
        return None if self.dense_score is None else self.score - self.dense_score


class Size(Value):
    """What a model takes: parameters, bytes on disk, KV-cache bytes per token.

    Zeros of a sparse model are not among `num_parameters`, but are among `num_bytes`: no format without them loads in
    transformers 5 or vLLM. `num_bitmask_bytes` is what such a format would take (values that are not zero, and a bit for
    each place of a sparse matrix); None for models that are not sparse.
    """

    num_parameters: int
    num_bytes: int
    kv_bytes_per_token: int
    num_bitmask_bytes: int | None = None


class Speed(Value):
    """Median tokens per second, batch of one, measured in turns with the dense model."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


class Point(Value):
    """What came out of a recipe: a point of the size/quality plane."""

    recipe: Recipe
    evaluations: tuple[Evaluation, ...]
    tasks: tuple[TaskScore, ...] = ()
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
