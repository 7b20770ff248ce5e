"""What a search would take on a cluster that is not here: memory, time, storage, traffic, money.

The performance model: a phase takes its operations (see `shoal.cost`) over what the accelerators reach, plus the bytes that
its collectives move over the slowest link on the way. Trials that run at once do not slow each other; what comes last
leaves accelerators idle. Nothing is overlapped, so that real runs should be a little faster. All figures are estimates:
`low` and `high` are the times at the highest and lowest efficiency that is likely.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.cost import DTYPE_BYTES, SHAPES, Hardware, Shape, target_bytes
from shoal.recipe import Recipe

from shoal_services.config import SearchConfig
from shoal_services.space import Choice, Range, list_ends

# Bytes for each trained parameter: float32 weight, gradient and AdamW's two moments.
TRAINED_BYTES = 16
RUNTIME_BYTES = 2e9  # CUDA context, kernels' work space and fragmentation: an allowance, not measured
FIT_BATCH = 8


@dataclass(frozen=True)
class Phase:
    """One part of the work: seconds on the accelerators it is given, and what its workers hold."""

    name: str
    seconds: float
    memory: float
    communication: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A search on `num_gpus` accelerators. Bytes are a worker's, but for storage and traffic; seconds are of the clock.

    A trial holds its weights whole in every worker; `shards` is the number of workers that they would have to be spread
    over to fit, which trials do not do yet, and so it fits if that is 1.
    `communication_per_step` counts bytes that a worker sends for one optimiser step.
    """

    num_gpus: int
    workers_per_trial: int
    shards: int
    concurrent_trials: int
    memory_per_worker: float
    fits: bool
    tokens_per_second: float
    prepare_seconds: float
    trial_seconds: float
    seconds: float
    low_seconds: float
    high_seconds: float
    communication_per_step: float
    storage_bytes: float
    traffic_bytes: float
    phases: tuple[Phase, ...]
    cost: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)


def plan_search(
    config: SearchConfig, shape: Shape, hardware: Hardware, num_gpus: int, *, price_per_gpu_hour: float | None = None
) -> Plan:
    """The plan of the search's middle recipe, for every trial. Raises ValueError if there are no accelerators."""
    if num_gpus < 1:
        raise ValueError(f"--gpus {num_gpus}: give 1 or more")
    recipe = middle_recipe(config)
    dtype = DTYPE_BYTES[config.dtype or "bfloat16"]
    shards = find_shards(config, recipe, shape, hardware, dtype)
    workers = min(config.run.most_workers, num_gpus)
    concurrent = max(1, min(num_gpus // workers, config.run.max_concurrent_trials or num_gpus, config.num_trials))
    prepared = prepare_seconds(config, shape, hardware, concurrent, workers)
    phases = trial_phases(config, recipe, shape, hardware, workers, 1, dtype)
    trial = sum(phase.seconds for phase in phases)
    memory = max(phase.memory for phase in phases)
    waves = math.ceil(config.num_trials / concurrent)
    seconds = prepared + waves * trial
    lowest, likely, highest = hardware.efficiency
    moved = sum(phase.communication / slowest_link(hardware, workers) for phase in phases) * waves
    computed = seconds - moved
    low, high = computed * likely / highest + moved, computed * likely / lowest + moved
    settings = recipe.distillation
    distil = next((phase for phase in phases if phase.name == "distil"), None)
    return Plan(
        num_gpus=num_gpus, workers_per_trial=workers, shards=shards, concurrent_trials=concurrent,
        memory_per_worker=memory, fits=shards == 1,
        tokens_per_second=settings.num_tokens / distil.seconds if settings and distil else 0.0,
        prepare_seconds=prepared, trial_seconds=trial, seconds=seconds, low_seconds=low, high_seconds=high,
        communication_per_step=distil.communication / settings.num_steps if settings and distil else 0.0,
        storage_bytes=storage_bytes(config, recipe, shape, dtype),
        traffic_bytes=traffic_bytes(config, recipe, shape, dtype, concurrent * workers, workers),
        phases=tuple(phases), cost=None if price_per_gpu_hour is None else price_per_gpu_hour * num_gpus * seconds / 3600,
    )  # fmt: skip


def read_shape(name: str, revision: str | None = None) -> Shape:
    """The sizes of a model by the name of a shape, a config.json, folder, Hub id or alias. Raises ValueError."""
    if name.lower().rpartition("/")[2] in SHAPES:
        return SHAPES[name.lower().rpartition("/")[2]]
    if name.endswith(".json"):
        try:
            return Shape.from_config(json.loads(Path(name).read_text()))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"--model-config {name!r} cannot be read: {error}") from error
    from shoal.models import read_config  # torch is not needed for the other two

    return Shape.from_config(read_config(name, revision=revision).to_dict())


def middle_recipe(config: SearchConfig) -> Recipe:
    """The recipe in the middle of every axis: numbers by their mean, choices of text by the first."""
    middle: dict[str, Any] = {}
    for name, axis in config.space.axes.items():
        ends = list_ends(axis)
        if isinstance(axis, Range):
            value = sum(ends) / len(ends)
            middle[name] = round(value) if axis.randint else value
        elif isinstance(axis, Choice):
            numbers = [v for v in ends if isinstance(v, int | float) and not isinstance(v, bool)]
            middle[name] = sorted(numbers)[len(numbers) // 2] if len(numbers) == len(ends) else ends[0]
    return config.make_recipe(middle)


def reached(hardware: Hardware) -> float:
    """Operations a second that one accelerator is likely to reach."""
    return hardware.operations * hardware.efficiency[1]


def slowest_link(hardware: Hardware, workers: int) -> float:
    """Bytes a second between the workers of one trial."""
    return hardware.link if workers <= hardware.per_node else hardware.network


def prepare_seconds(config: SearchConfig, shape: Shape, hardware: Hardware, concurrent: int, workers: int) -> float:
    """Moments and the dense model's targets, measured once over all accelerators."""
    texts, space = config.texts, config.space
    moments = texts.calibration_tokens * (shape.forward_operations(texts.window) + shape.moment_operations())
    distillation = space.highest("distillation_tokens")
    targets = (distillation + texts.selection_tokens + texts.evaluation_tokens * len(texts.evaluation)) * (
        shape.forward_operations(texts.window)
    )
    return (moments + targets) / (reached(hardware) * concurrent * workers)


def trial_phases(
    config: SearchConfig, recipe: Recipe, shape: Shape, hardware: Hardware, workers: int, shards: int, dtype: int
) -> list[Phase]:
    """Fit, distillation and evaluation of one trial. The fit and the evaluation are one worker's; the others wait."""
    texts, student = config.texts, shape.without(recipe.num_replaced)
    maps = recipe.num_replaced if recipe.kind in ("linear", "low_rank") else 0
    student_bytes = (student.num_parameters + maps * shape.width**2) * dtype
    dense_bytes = shape.num_parameters * dtype
    held = (dense_bytes + student_bytes) / shards + RUNTIME_BYTES
    # The walk: the teacher's blocks, the student's, and the sums for `down_proj` with a Cholesky solve for each block.
    fit = texts.calibration_tokens * 2 * shape.forward_operations(texts.window)
    streams = 4 * texts.calibration_tokens * shape.width * dtype + texts.calibration_tokens * shape.mlp_width * dtype
    gram = 4 * 8 * shape.width**2
    if recipe.refit_down_proj:
        fit += texts.calibration_tokens * shape.refit_operations()
        fit += student.num_blocks * (shape.mlp_width**3 / 3 + 2 * shape.mlp_width**2 * shape.width)
        gram = 3 * 8 * shape.mlp_width**2
    evaluated = texts.evaluation_tokens * len(texts.evaluation) * student.forward_operations(texts.window)
    logits = 4 * min(2**28, FIT_BATCH * texts.window * shape.vocabulary)
    phases = [
        Phase("fit", fit / reached(hardware), dense_bytes / shards + streams + gram + RUNTIME_BYTES),
        Phase("evaluate", evaluated / reached(hardware), held + 2 * logits),
    ]
    settings = recipe.distillation
    if settings is None:
        return phases
    trained = student.trained_parameters(settings, maps)
    operations = student.step_operations(settings.window, settings.trained, settings.lora_rank)
    if settings.loss.needs_hidden_states:
        operations += shape.forward_operations(settings.window)
    per_pass = settings.window * min(settings.windows_per_pass, math.ceil(settings.windows_per_step / workers))
    activations = student.activation_bytes(per_pass, dtype, lora=settings.trained == "lora")
    share = min(workers, settings.windows_per_step)  # more workers than windows have nothing to do
    communication = settings.num_steps * bytes_per_step(trained, student_bytes, workers, shards)
    seconds = settings.num_tokens * operations / (reached(hardware) * share)
    seconds += communication / slowest_link(hardware, workers)
    memory = held + TRAINED_BYTES * trained / shards + activations
    return [phases[0], Phase("distil", seconds, memory, communication), phases[1]]


def bytes_per_step(trained: int, student_bytes: float, workers: int, shards: int) -> float:
    """What a worker sends in one optimiser step: gradients by a ring, and, sharded, weights forward and backward."""
    ring = (workers - 1) / workers
    gathered = 2 * student_bytes * (shards - 1) / shards
    return 2 * 4 * trained * ring + gathered


def find_shards(config: SearchConfig, recipe: Recipe, shape: Shape, hardware: Hardware, dtype: int) -> int:
    """The fewest workers, a power of two, over which a trial's weights must be spread to fit; 1024 if none suffices."""
    for power in range(11):
        shards = 2**power
        workers = max(config.run.num_workers, shards)
        phases = trial_phases(config, recipe, shape, hardware, workers, shards, dtype)
        if max(phase.memory for phase in phases) <= hardware.memory:
            return shards
    return 1024


def storage_bytes(config: SearchConfig, recipe: Recipe, shape: Shape, dtype: int) -> float:
    """What the search's folder grows to: moments, targets, fits, one checkpoint a running trial, kept models."""
    texts, space = config.texts, config.space
    student = shape.without(recipe.num_replaced)
    targets = target_bytes(int(space.highest("distillation_tokens")), len(space.temperatures))
    targets += target_bytes(texts.selection_tokens + texts.evaluation_tokens * len(texts.evaluation))
    fits = config.num_trials * (student.num_blocks * shape.width * shape.mlp_width * dtype + 4 * shape.width**2)
    models = config.num_trials * student.num_parameters * dtype
    trained = student.trained_parameters(recipe.distillation, 0) if recipe.distillation else 0
    return shape.moments_bytes() + targets + fits + models + TRAINED_BYTES * trained


def traffic_bytes(
    config: SearchConfig, recipe: Recipe, shape: Shape, dtype: int, total_workers: int, workers: int
) -> float:
    """What goes to and from storage: every worker of every trial reads the dense weights; each trial writes its model."""
    dense, student = shape.num_parameters * dtype, shape.without(recipe.num_replaced).num_parameters * dtype
    shards_of_moments = 2 * total_workers * shape.moments_bytes()
    return dense * (total_workers + config.num_trials * workers) + config.num_trials * student + shards_of_moments
