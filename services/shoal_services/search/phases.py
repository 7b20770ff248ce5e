"""What the parts of one trial take: seconds on its workers, what each of them holds, what it sends.

A trial whose weights are whole in every worker has its windows shared out alone. A streamed one (`run.streamed`) fits and
evaluates with one block in memory, and distils with the weights of the student, and of the teacher where its streams are
needed, shared out too: every worker holds its share, two gathered blocks, and what is outside the blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.cost import DTYPE_BYTES, Hardware, ModelShape
from shoal.large.memory import MAX_LOGITS, MAX_STREAM_BYTES
from shoal.recipe import Recipe

from shoal_services.search.config import SearchConfig

# Bytes for each trained parameter: float32 weight, gradient and AdamW's two moments.
TRAINED_BYTES = 16
RUNTIME_BYTES = 2e9  # CUDA context, kernels' work space and fragmentation: an allowance, not measured
FIT_BATCH = 8
# Of a choice by KL (see `shoal.replace.judge`): a hundred quick looks at 1,024 tokens through three fifths of the model,
# four walks of 8,192 by two streams; and the tokens whose streams it keeps.
CHOICE_TOKENS, KEPT_TOKENS = 136_000, 9_216
# The block that is computed, and the next, which is on its way.
GATHERED_BLOCKS = 2
# What a worker reads from storage: an assumption, for NVMe or a parallel file system.
STORAGE_BYTES_PER_S = 2e9


@dataclass(frozen=True)
class Phase:
    """One part of the work: seconds, bytes that a worker holds, and bytes that it sends to the others."""

    name: str
    seconds: float
    memory: float
    communication: float = 0.0


@dataclass(frozen=True)
class TrialWork:
    """A trial of `recipe` on so many workers, its weights whole in each of them or `streamed`."""

    config: SearchConfig
    recipe: Recipe
    shape: ModelShape
    hardware: Hardware
    workers: int
    streamed: bool

    def phases(self) -> list[Phase]:
        """Choice, fit, distillation and evaluation. The fit and the last are one worker's; the others wait."""
        is_chosen = self.recipe.replaces_blocks and self.recipe.selection == "kl" and not self.streamed
        first = [self.choose(), self.fit()] if is_chosen else [self.fit()]
        return [*first, *([] if self.recipe.distillation is None else [self.distil()]), self.evaluate()]

    @property
    def memory(self) -> float:
        """Bytes that a worker holds at most."""
        return max(phase.memory for phase in self.phases())

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.config.dtype or "bfloat16"]

    @property
    def student(self) -> ModelShape:
        return self.shape.without(self.num_replaced)

    @property
    def num_replaced(self) -> int:
        """Blocks that go, or as many as hold what the budget says goes."""
        if self.recipe.budget is None:
            return self.recipe.num_replaced
        name, share = self.recipe.budget
        if name == "kv_cache":
            return round((1 - share) * self.shape.num_blocks)
        return round((1 - share) * self.shape.num_parameters / self.shape.block_parameters)

    @property
    def num_maps(self) -> int:
        return self.num_replaced if self.recipe.kind in ("linear", "low_rank") else 0

    @property
    def dense_bytes(self) -> float:
        return self.shape.num_parameters * self.dtype_bytes

    @property
    def student_bytes(self) -> float:
        return (self.student.num_parameters + self.num_maps * self.shape.width**2) * self.dtype_bytes

    @property
    def streamed_bytes(self) -> float:
        """Of a model whose blocks are on disk: one of them, and what is outside."""
        return (self.shape.block_parameters + self.shape.outer_parameters) * self.dtype_bytes

    def choose(self) -> Phase:
        """A choice by KL that shares with no other trial; it keeps the dense streams at every place of what it reads."""
        shape, selection = self.shape, self.config.texts.selection_tokens
        seconds = self._seconds((CHOICE_TOKENS + 7 * selection) * shape.forward_operations(self.config.texts.window))
        streams = (KEPT_TOKENS + selection) * (2 * shape.num_blocks + 1) * shape.width * self.dtype_bytes
        return Phase("choose", seconds, self.dense_bytes + streams + RUNTIME_BYTES)

    def fit(self) -> Phase:
        """The walk: the teacher's blocks, the student's, and the sums for `down_proj` with a solve for each block."""
        shape, tokens = self.shape, self.config.texts.find_calibration_tokens(self.shape.width)
        operations = tokens * 2 * shape.forward_operations(self.config.texts.window)
        streams = tokens * (4 * shape.width + shape.mlp_width) * self.dtype_bytes
        sums = 4 * 8 * shape.width**2
        seconds = 0.0
        if self.recipe.refit:
            operations += tokens * shape.refit_operations()
            seconds += self.student.solve_operations() / reached_64(self.hardware)
            sums = 5 * 8 * shape.mlp_width**2  # of both halves and of all, centred, and a factor
        if self.streamed:  # the wide inputs of `down_proj` are computed again, not kept
            streams = tokens * 4 * shape.width * self.dtype_bytes
            operations += tokens * shape.forward_operations(self.config.texts.window)
        held = self.streamed_bytes if self.streamed else self.dense_bytes
        seconds += self._seconds(operations) + self._reading(self.dense_bytes)
        return Phase("fit", seconds, held + streams + sums + RUNTIME_BYTES)

    def distil(self) -> Phase:
        settings = self.recipe.distillation
        assert settings is not None
        shape, student, asks = self.shape, self.student, settings.loss.needs_hidden_states
        trained = student.trained_parameters(settings, self.num_maps)
        operations = student.step_operations(settings.window, settings.trained, settings.lora_rank)
        if settings.gradient_checkpointing:
            operations += student.forward_operations(settings.window)
        if asks:
            operations += shape.forward_operations(settings.window)
        busy = min(self.workers, settings.windows_per_step)  # more workers than windows have nothing to do
        per_worker = math.ceil(settings.windows_per_step / self.workers)
        windows = min(settings.windows_per_pass, per_worker)
        num_passes = math.ceil(per_worker / settings.windows_per_pass)
        activations = student.activation_bytes(
            settings.window * windows, self.dtype_bytes, lora=settings.trained == "lora",
            checkpointed=settings.gradient_checkpointing,
        )  # fmt: skip
        if self.streamed:
            weights = self.student_bytes + asks * self.dense_bytes
            gathered = (GATHERED_BLOCKS * shape.block_parameters + shape.outer_parameters) * self.dtype_bytes
            held = (weights + TRAINED_BYTES * trained) / self.workers + gathered
            gathers = 2 * self.student_bytes + asks * self.dense_bytes
            sent = sharded_bytes_per_step(trained, gathers, self.workers, num_passes)
        else:
            held = self.dense_bytes + self.student_bytes + TRAINED_BYTES * trained
            weights, sent = 0.0, bytes_per_step(trained, self.workers)
        communication = settings.num_steps * sent
        seconds = self._seconds(settings.num_tokens * operations) / busy + self._reading(weights)
        seconds += communication / self.link
        return Phase("distil", seconds, held + activations + RUNTIME_BYTES, communication)

    def evaluate(self) -> Phase:
        texts, shape = self.config.texts, self.shape
        tokens = texts.evaluation_tokens * len(texts.evaluation)
        seconds = self._seconds(tokens * self.student.forward_operations(texts.window))
        stream = tokens * shape.width * self.dtype_bytes
        seconds += self._reading(self.student_bytes * math.ceil(stream / MAX_STREAM_BYTES))
        if self.streamed:
            logits = 4 * texts.window * shape.vocabulary
            held = self.streamed_bytes + min(stream, MAX_STREAM_BYTES)
        else:
            logits = 4 * min(MAX_LOGITS, FIT_BATCH * texts.window * shape.vocabulary)
            held = self.dense_bytes + self.student_bytes
        return Phase("evaluate", seconds, held + 2 * logits + RUNTIME_BYTES)

    @property
    def link(self) -> float:
        """Bytes a second between the workers."""
        return self.hardware.link if self.workers <= self.hardware.per_node else self.hardware.network

    def _seconds(self, operations: float) -> float:
        return operations / reached(self.hardware)

    def _reading(self, num_bytes: float) -> float:
        """Seconds to read from storage what is not in memory."""
        return num_bytes / STORAGE_BYTES_PER_S if self.streamed else 0.0


def reached(hardware: Hardware) -> float:
    """Operations a second that one accelerator is likely to reach."""
    return hardware.operations * hardware.efficiency[1]


def reached_64(hardware: Hardware) -> float:
    """The same in float64."""
    return hardware.operations_64 * hardware.efficiency[1]


def bytes_per_step(trained: int, workers: int) -> float:
    """What a worker sends in an optimiser step where all hold whole weights: float32 gradients by a ring."""
    return 2 * 4 * trained * (workers - 1) / workers


def sharded_bytes_per_step(trained: int, gathers: float, workers: int, num_passes: int) -> float:
    """The same where weights are shared out: in each pass, weights are gathered and gradients scattered."""
    return num_passes * (gathers + 4 * trained) * (workers - 1) / workers
