"""What a recipe costs, from a model's shape: operations, bytes and tokens. Arithmetic alone: no torch, no model.

d width, f width of the MLP, L blocks, V vocabulary, T window. A matrix product of P weights takes 2 P operations a
token; the backward pass takes as much again for the inputs and, where the weights are trained, for them too.
`tests/fit_cost.py` measures random small models and prints how far these formulas are off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from shoal.recipe import NUM_TOP, Distillation

NUM_RIDGES = 3  # that are tried, as a rule, of `shoal.replace.fit.RIDGES`
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes: all that its cost depends on."""

    num_blocks: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool = False
    gated: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From the entries of a `config.json`. Raises ValueError if a size is not there."""

        def find(*names: str, default: Any = None) -> Any:
            value = next((config[name] for name in names if config.get(name) is not None), default)
            if value is None:
                raise ValueError(f"the configuration has no {names[0]!r}; give the config.json of a decoder")
            return value

        if isinstance(config.get("text_config"), Mapping):
            return cls.from_config(config["text_config"])
        if find("num_local_experts", "num_experts", default=0):
            raise ValueError("a mixture of experts is not planned for: its cost depends on where tokens are sent")
        width, heads = find("hidden_size", "n_embd"), find("num_attention_heads", "n_head")
        activation = str(find("hidden_act", "activation_function", default="silu"))
        return cls(
            num_blocks=find("num_hidden_layers", "n_layer"), width=width, num_heads=heads,
            mlp_width=find("intermediate_size", "ffn_dim", "n_inner", default=4 * width),
            num_kv_heads=find("num_key_value_heads", default=heads), head_width=find("head_dim", default=width // heads),
            vocabulary=find("vocab_size"), tied=bool(config.get("tie_word_embeddings", False)),
            gated=activation in ("silu", "swish", "gelu_pytorch_tanh") and "intermediate_size" in config,
        )  # fmt: skip

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_width

    @property
    def block_parameters(self) -> int:
        """Weights of a block's projections and norms."""
        q = self.num_heads * self.head_width
        return self.width * (2 * q + 2 * self.kv_width + (2 + self.gated) * self.mlp_width + 2)

    @property
    def outer_parameters(self) -> int:
        """What is outside the blocks: embeddings, the last norm, the LM head."""
        return self.width + (2 - self.tied) * self.vocabulary * self.width

    @property
    def num_parameters(self) -> int:
        return self.num_blocks * self.block_parameters + self.outer_parameters

    def without(self, num_replaced: int) -> ModelShape:
        """With fewer blocks."""
        return ModelShape(**{**vars(self), "num_blocks": self.num_blocks - num_replaced})

    def lora_parameters(self, rank: int) -> int:
        """Of adapters on every projection of every block."""
        q = self.num_heads * self.head_width
        ends = 2 * (self.width + q) + 2 * (self.width + self.kv_width) + (2 + self.gated) * (self.width + self.mlp_width)
        return self.num_blocks * rank * ends

    def trained_parameters(self, settings: Distillation, num_maps: int) -> int:
        """Of the student of this shape, with that many full affine maps."""
        maps = num_maps * self.width * (self.width + 1)
        return maps + {
            "maps": 0, "lora": self.lora_parameters(settings.lora_rank),
            "blocks": self.num_blocks * self.block_parameters, "all": self.num_parameters,
        }[settings.trained]  # fmt: skip

    def forward_operations(self, window: int) -> float:
        """Per token; causal attention looks at half the window on average."""
        attention = 2 * self.num_blocks * window * self.num_heads * self.head_width
        return 2.0 * (self.num_blocks * self.block_parameters + self.vocabulary * self.width) + attention

    def step_operations(self, window: int, trained: str, lora_rank: int = 0) -> float:
        """Per token of distillation, forward and backward, without the teacher."""
        forward = self.forward_operations(window)
        if trained in ("blocks", "all"):
            return 3 * forward
        return 2 * forward + (6.0 * self.lora_parameters(lora_rank) if trained == "lora" else 0)

    def moment_operations(self) -> float:
        """Per token and all blocks: Σ x xᵀ and Σ x yᵀ."""
        return 4.0 * self.num_blocks * self.width**2

    def refit_operations(self) -> float:
        """Per token and all blocks: Σ z zᵀ and Σ z yᵀ of `down_proj`."""
        return 2.0 * self.num_blocks * self.mlp_width * (self.mlp_width + self.width)

    def score_operations(self) -> float:
        """In float64, once: three least-squares fits and a product for each block (see `shoal.linearity.scores`)."""
        return 9.0 * self.num_blocks * self.width**3

    def solve_operations(self) -> float:
        """In float64, of all blocks: for every λ tried and the last fit a Cholesky factor of Σ z zᵀ, its solution for
        `down_proj`, and its error on held-out tokens."""
        factor, product = self.mlp_width**3 / 3, 2.0 * self.mlp_width**2 * self.width
        return self.num_blocks * (NUM_RIDGES * (factor + 2 * product) + factor + product)

    def moments_bytes(self) -> int:
        """Four sets of two d × d matrices in float64 for each block, whatever the number of tokens."""
        return 64 * self.num_blocks * self.width**2

    def activation_bytes(self, tokens: int, dtype_bytes: int, *, lora: bool = True, checkpointed: bool = False) -> float:
        """What a forward pass keeps for the backward pass, logits included.

        A block keeps, for each token: its two norms' inputs in float32 and outputs (6 widths), attention's inputs and
        output, and of the MLP the gate before and after its activation, its other input, and their product. Adapters keep
        little. `checkpointed`: each block keeps its input, and one block at a time the rest.
        """
        q = self.num_heads * self.head_width
        block = (6 * self.width + 2 * q + 2 * self.kv_width + (2 + 2 * self.gated) * self.mlp_width) * dtype_bytes
        blocks = self.num_blocks * self.width * dtype_bytes + block if checkpointed else self.num_blocks * block
        return tokens * (blocks * (1.05 if lora else 1.0) + self.vocabulary * dtype_bytes)


# Sizes from the config.json files that their makers publish.
SHAPES = {
    "llama-2-7b": ModelShape(32, 4096, 11008, 32, 32, 128, 32000),
    "llama-3.1-8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3.1-70b": ModelShape(80, 8192, 28672, 64, 8, 128, 128256),
    "llama-3.1-405b": ModelShape(126, 16384, 53248, 128, 8, 128, 128256),
}


def target_bytes(tokens: int, num_temperatures: int = 1) -> int:
    """Of the teacher's top tokens (an int32 id and a float32 logit each), normalisers and losses."""
    return tokens * (8 * NUM_TOP + 4 * num_temperatures + 4)


@dataclass(frozen=True)
class Hardware:
    """One accelerator. `operations` are dense bfloat16 a second, `operations_64` float64.

    `memory_bandwidth`, `link` (within a node) and `network` (between nodes, its share) are bytes a second. `efficiency` is
    the share of `operations` that large products reach: the lowest, the likely and the highest.
    """

    memory: float
    operations: float
    operations_64: float
    memory_bandwidth: float
    link: float
    network: float
    per_node: int
    efficiency: tuple[float, float, float]


# Efficiencies of GPUs are assumptions: published training runs of large decoders reach 30 to 55 % of peak in bfloat16.
ASSUMED = (0.25, 0.40, 0.55)
HARDWARE: dict[str, Hardware] = {
    # NVIDIA's data sheets, SXM variants; dense figures are half of those "with sparsity". Network: 400 Gb/s a GPU.
    "a100": Hardware(80e9, 312e12, 19.5e12, 2.04e12, 300e9, 25e9, 8, ASSUMED),
    "h100": Hardware(80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9, 8, ASSUMED),
    "h200": Hardware(141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9, 8, ASSUMED),
    "b200": Hardware(180e9, 2250e12, 37e12, 8.0e12, 900e9, 50e9, 8, ASSUMED),
    "l40s": Hardware(48e9, 362e12, 1.4e12, 0.864e12, 32e9, 12.5e9, 8, ASSUMED),
}

# The largest error of seconds and bytes of random models that nothing was fitted on (`tests/fit_cost.py`):
# forward 21 %, distillation step 19 %, bytes kept 13 % too many (one core, float32).
FORMULA_ERROR = 0.21
