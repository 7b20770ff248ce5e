"""What to make: a `Recipe`, and how what it makes is trained.

Nothing here says how a thing is run (workers, resources, paths), and nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from shoal.texts import Text
from shoal.units import Unit, list_places, name_units, read_unit
from shoal.value import Value, fingerprint

Kind = Literal["linear", "low_rank", "folded", "dropped"]
Selection = Literal["linearity", "linearity_in_sample", "linearity_without_residual", "cosine", "window", "kl", "listed"]
Fit = Literal["in_order", "independent"]
Trained = Literal["maps", "lora", "blocks", "all"]

Sparsity = float | Literal["2:4", "4:8"]

# Of the dense model's tokens at a place, those that are kept for a student to learn from; the rest are one bucket.
NUM_TOP = 64
# Peak rates that heal best (SmolLM2-135M, 400k tokens: FINDINGS, "What heals"): the more weights learn, the smaller.
LEARNING_RATES: dict[object, float] = {"maps": 5e-4, "lora": 5e-4, "blocks": 1.5e-4, "all": 1e-4}
KINDS: tuple[Kind, ...] = ("linear", "low_rank", "folded", "dropped")


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
    trained: Trained = Field(default="blocks", description="what learns: maps, maps and LoRA factors, the blocks, or all")
    learning_rate: float = Field(
        default=1.5e-4, gt=0, description="the highest; by default 1.5e-4, of all 1e-4, of maps and LoRA 5e-4"
    )
    windows_per_step: int = Field(default=2, ge=1, description="the batch of an optimiser step")
    lora_rank: int = Field(default=32, ge=1, description="of the LoRA factors")
    patience: int | None = Field(default=None, ge=1, description="checks without improvement before an early stop")

    @model_validator(mode="before")
    @classmethod
    def _rate_by_what_learns(cls, data: object) -> object:
        if not isinstance(data, dict) or data.get("learning_rate") is not None:
            return data
        trained = data.get("trained", cls.model_fields["trained"].default)
        return {**data, "learning_rate": LEARNING_RATES[trained]} if trained in LEARNING_RATES else data


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
    """What to make of which model. `blocks` is filled in once they are chosen: blocks, and parts of blocks that stay.

    How many go is said by `num_replaced`, or by a budget: `parameters` or `kv_cache`, the share of the dense model's that
    stays at most. With `parts`, the attention and the MLP of a block may be chosen apart.

    `weight_share` and `sparsity` are for the projections of the blocks that stay: the share of their parameters that
    low-rank factors keep, and the share of their weights that are zero ("2:4": 2 of each 4 stay).
    """

    base_model: str
    revision: str | None = None
    weights_sha256: str | None = None
    num_replaced: int = Field(default=0, ge=0, description="blocks that go; or say parameters")
    parameters: float | None = Field(default=None, gt=0, lt=1, description="the share of the dense model's that may stay")
    kv_cache: float | None = Field(default=None, gt=0, lt=1, description="the share of its KV cache that may stay")
    parts: bool = Field(default=False, description="with a budget: attention and MLP of a block may go apart")
    blocks: tuple[Annotated[Unit, BeforeValidator(read_unit)], ...] | None = None
    kind: Kind = Field(default="linear", description="what stands in for a run of replaced blocks")
    rank: int | None = Field(default=None, ge=1)
    selection: Selection | None = Field(
        default=None, description="how blocks are chosen: by kl, or if streamed by linearity"
    )
    fit: Fit = Field(default="in_order", description="maps on the student's own stream, or each on the dense model's")
    refit: bool = Field(default=True, description="fit `o_proj` and `down_proj` of kept blocks again in the same walk")
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
    def _sorted_and_unique(cls, blocks: tuple[Unit, ...] | None) -> tuple[Unit, ...] | None:
        if blocks is None:
            return None
        places = [place for block in blocks for place in list_places([block])]
        twice = {place // 2 for place in places if places.count(place) > 1}
        if twice:
            raise ValueError(f"blocks lists {sorted(twice)} more than once; name each block once")
        return name_units(places)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.blocks is not None and len(self.blocks) != self.num_replaced:
            raise ValueError(f"num_replaced={self.num_replaced} but blocks names {len(self.blocks)}: make them agree")
        is_counted = bool(self.num_replaced and not self.blocks)
        if self.parameters is not None and self.kv_cache is not None:
            raise ValueError("parameters and kv_cache are two budgets: give one of them")
        if self.budget and (is_counted or self.selection not in (None, "kl", "listed")):
            raise ValueError(f"{self.budget[0]}=… says how much goes, by kl: leave num_replaced and selection out")
        if self.parts and not self.budget:
            raise ValueError("parts=True needs parameters or kv_cache, the share that stays: parts are no number of blocks")
        if self.takes_parts and (self.kind == "folded" or self.fit == "independent"):
            raise ValueError("attention and MLP go apart with kind linear, low_rank or dropped, and fit='in_order' alone")
        if self.selection == "listed" and self.blocks is None:
            raise ValueError("selection='listed' needs blocks; name them or choose another selection")
        if (self.kind == "low_rank") != (self.rank is not None):
            raise ValueError(f"kind={self.kind!r} with rank={self.rank!r}: give rank with kind='low_rank', and only there")
        no_maps = self.kind in ("folded", "dropped") or not self.replaces_blocks
        if no_maps and self.distillation and self.distillation.trained == "maps":
            what = f"kind={self.kind!r}" if self.num_replaced else "num_replaced=0"
            raise ValueError(f"{what} leaves no maps to train; use trained='blocks' or 'lora'")
        if self.kind == "folded" and self.fit == "independent":
            raise ValueError("kind='folded' is fitted along the student's own stream; use fit='in_order'")
        return self

    @property
    def budget(self) -> tuple[str, float] | None:
        """What may not be more than a share of the dense model's, and the share."""
        given = {"parameters": self.parameters, "kv_cache": self.kv_cache}
        return next(((name, share) for name, share in given.items() if share is not None), None)

    @property
    def asks_for_kl(self) -> bool:
        """Whether nothing but KL can choose."""
        return self.selection == "kl" or (self.budget is not None and self.blocks is None)

    def settle(self, *, streamed: bool = False) -> Self:
        """With the rule that chooses blocks where none was named: by KL, which would read a streamed model too often."""
        rule: Selection = "listed" if self.blocks is not None else "linearity" if streamed else "kl"
        return self.model_copy(update={"selection": self.selection or rule})

    @property
    def replaces_blocks(self) -> bool:
        """Whether blocks, or parts of them, go."""
        return bool(self.num_replaced or self.budget)

    @property
    def takes_parts(self) -> bool:
        """Whether the attention and the MLP of a block may go apart."""
        return self.parts or any(isinstance(unit, str) for unit in self.blocks or ())

    @property
    def changes(self) -> str:
        """What is done to the dense model, in a few words: "4 blocks and 3 parts linear, 2:4 sparse"."""
        kind = self.kind + (f"({self.rank})" if self.rank else "")
        parts = [f"{self.count_units()} {kind}"] if self.replaces_blocks or not self.weight_changes else []
        return ", ".join([*parts, *self.weight_changes])

    def count_units(self) -> str:
        """How much goes: "4 blocks", "4 blocks and 3 parts"; before it is chosen, "down to 85 % of the parameters"."""
        if self.blocks is None and self.budget:
            what = {"parameters": "parameters", "kv_cache": "KV cache"}[self.budget[0]]
            return f"down to {100 * self.budget[1]:g} % of the {what}"
        num_parts = sum(isinstance(unit, str) for unit in self.blocks or ())
        num_blocks = self.num_replaced - num_parts
        counts = [f"{num_blocks} blocks"] if num_blocks or not num_parts else []
        return " and ".join([*counts, f"{num_parts} parts"] if num_parts else counts)

    @property
    def weight_changes(self) -> tuple[str, ...]:
        """What is done to the weights of the blocks that stay: "SVD 80 %", "50 % sparse", "2:4 sparse"."""
        factored = () if self.weight_share is None else (f"SVD {100 * self.weight_share:g} %",)
        if self.sparsity is None:
            return factored
        return (*factored, f"{self.sparsity if isinstance(self.sparsity, str) else f'{100 * self.sparsity:g} %'} sparse")

    @property
    def lesson(self) -> str:
        """What was learned from, and how often if more than once: "400,000 tokens of notes.txt (1.3 times over)"."""
        assert self.distillation is not None
        steps, text = self.distillation, self.distillation_text
        num_tokens = steps.num_steps * steps.windows_per_step * steps.window
        if text is None:
            return f"{num_tokens:,} tokens"
        often = f" ({num_tokens / text.num_tokens:.1f} times over)" if num_tokens > text.num_tokens else ""
        return f"{num_tokens:,} tokens of {text.name}{often}"

    @property
    def training_texts(self) -> list[str]:
        """Names of the texts that the model was calibrated on."""
        return [name for text in self.calibration for name in text.name.split(" + ")]

    @property
    def short_name(self) -> str:
        """The same as part of a name: "folded-4-sparse2of4"."""
        how_much = f"{self.num_replaced}"
        if self.budget:
            how_much = f"{100 * self.budget[1]:g}{'p' if self.budget[0] == 'parameters' else 'kv'}"
        parts = [f"{self.kind}-{how_much}"] if self.replaces_blocks or not self.weight_changes else []
        if self.weight_share is not None:
            parts.append(f"svd{100 * self.weight_share:g}")
        if self.sparsity is not None:
            share = self.sparsity.replace(":", "of") if isinstance(self.sparsity, str) else f"{100 * self.sparsity:g}"
            parts.append(f"sparse{share}")
        return "-".join(parts)

    @property
    def is_stock(self) -> bool:
        """Whether the model is of a stock architecture, which loads with nobody's code."""
        is_without_maps = self.kind in ("folded", "dropped") or not self.replaces_blocks
        return self.weight_share is None and not self.takes_parts and is_without_maps

    @property
    def key(self) -> str:
        """A short name that is the same for equal recipes, on every machine."""
        return fingerprint(self.model_dump(mode="json"))
