"""What a search would take on a cluster that is not here: memory, time, storage, traffic, money.

The performance model: a phase (see `phases`) takes its operations over what the accelerators reach, plus the bytes that
its collectives move over the slowest link on the way, plus, streamed, the bytes that it reads over the storage's speed.
Trials that run at once do not slow each other; what comes last leaves accelerators idle. Nothing is overlapped, so that
real runs should be a little faster. All figures are estimates: `low` and `high` are the times at the highest and lowest
efficiency that is likely.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.cost import SHAPES, Hardware, ModelShape, target_bytes
from shoal.large.memory import MAX_STREAM_BYTES
from shoal.recipe import Recipe

from shoal_services.search.config import SearchConfig
from shoal_services.search.phases import (
    STORAGE_BYTES_PER_S,
    TRAINED_BYTES,
    Phase,
    TrialWork,
    reached,
    reached_64,
)
from shoal_services.search.space import Choice, Range, list_ends


@dataclass(frozen=True)
class Plan:
    """A search on `num_gpus` accelerators. Bytes are a worker's, but for storage and traffic; seconds are of the clock.

    `fits`: a worker's memory suffices for a trial as the file has it. `workers_to_fit` is the smallest power of two of
    workers that do with `run.streamed`, None if 1,024 would not.
    `communication_per_step` counts bytes that a worker sends for one optimiser step.
    """

    num_gpus: int
    workers_per_trial: int
    streamed: bool
    workers_to_fit: int | None
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
    config: SearchConfig, shape: ModelShape, hardware: Hardware, num_gpus: int, *, price_per_gpu_hour: float | None = None
) -> Plan:
    """The plan of the search's middle recipe, for every trial. Raises ValueError if there are no accelerators."""
    if num_gpus < 1:
        raise ValueError(f"--gpus {num_gpus}: give 1 or more")
    recipe = middle_recipe(config)
    workers = min(config.run.most_workers, num_gpus)
    work = TrialWork(config, recipe, shape, hardware, workers, config.run.streamed)
    concurrent = max(1, min(num_gpus // workers, config.run.max_concurrent_trials or num_gpus, config.num_trials))
    prepared, phases = prepare_seconds(work, concurrent), work.phases()
    trial = sum(phase.seconds for phase in phases)
    waves = math.ceil(config.num_trials / concurrent)
    seconds = prepared + waves * trial
    lowest, likely, highest = hardware.efficiency
    moved = sum(phase.communication / work.link for phase in phases) * waves
    computed = seconds - moved
    low, high = computed * likely / highest + moved, computed * likely / lowest + moved
    settings = recipe.distillation
    distil = next((phase for phase in phases if phase.name == "distil"), None)
    return Plan(
        num_gpus=num_gpus, workers_per_trial=workers, streamed=work.streamed, workers_to_fit=find_workers(work),
        concurrent_trials=concurrent, memory_per_worker=work.memory, fits=work.memory <= hardware.memory,
        tokens_per_second=settings.num_tokens / distil.seconds if settings and distil else 0.0,
        prepare_seconds=prepared, trial_seconds=trial, seconds=seconds, low_seconds=low, high_seconds=high,
        communication_per_step=distil.communication / settings.num_steps if settings and distil else 0.0,
        storage_bytes=storage_bytes(work), traffic_bytes=traffic_bytes(work, concurrent * workers),
        phases=tuple(phases), cost=None if price_per_gpu_hour is None else price_per_gpu_hour * num_gpus * seconds / 3600,
    )  # fmt: skip


def read_shape(name: str, revision: str | None = None) -> ModelShape:
    """The sizes of a model by the name of a shape, a config.json, folder, Hub id or alias. Raises ValueError."""
    if name.lower().rpartition("/")[2] in SHAPES:
        return SHAPES[name.lower().rpartition("/")[2]]
    if name.endswith(".json"):
        try:
            return ModelShape.from_config(json.loads(Path(name).read_text()))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"--model-config {name!r} cannot be read: {error}") from error
    from shoal.checkpoints.config import read_config  # torch is not needed for the other two

    return ModelShape.from_config(read_config(name, revision=revision).to_dict())


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


def prepare_seconds(work: TrialWork, concurrent: int) -> float:
    """Moments, scores and the dense model's targets, once, over all accelerators; a streamed model's moments on one."""
    texts, shape, total = work.config.texts, work.shape, concurrent * work.workers
    forward = shape.forward_operations(texts.window)
    moments = texts.find_calibration_tokens(shape.width) * (forward + shape.moment_operations()) / reached(work.hardware)
    distillation = work.config.space.highest("distillation_tokens")
    tokens = distillation + texts.selection_tokens + texts.evaluation_tokens * len(texts.evaluation)
    targets = tokens * forward / (reached(work.hardware) * total)
    scores = shape.score_operations() / reached_64(work.hardware)
    if not work.streamed:
        return moments / total + targets + scores
    # Once for the hash of the weights, once for the moments, and for the targets as often as their streams are too large.
    stream = tokens / total * shape.width * work.dtype_bytes
    reading = (2 + math.ceil(stream / MAX_STREAM_BYTES)) * work.dense_bytes + 2 * shape.moments_bytes()
    return moments + targets + scores + reading / STORAGE_BYTES_PER_S


def find_workers(work: TrialWork) -> int | None:
    """The fewest workers, a power of two, with which a streamed trial fits in their memory; None for more than 1,024."""
    tried = (dataclasses.replace(work, workers=2**power, streamed=True) for power in range(11))
    return next((one.workers for one in tried if one.memory <= work.hardware.memory), None)


def storage_bytes(work: TrialWork) -> float:
    """What the search's folder grows to: moments, targets, fits, one checkpoint a running trial, kept models."""
    config, shape, student = work.config, work.shape, work.student
    texts, space, settings = config.texts, config.space, work.recipe.distillation
    targets = target_bytes(int(space.highest("distillation_tokens")), len(space.temperatures))
    targets += target_bytes(texts.selection_tokens + texts.evaluation_tokens * len(texts.evaluation))
    fits = config.num_trials * (student.num_blocks * shape.width * shape.mlp_width * work.dtype_bytes + 4 * shape.width**2)
    trained = student.trained_parameters(settings, work.num_maps) if settings else 0
    return shape.moments_bytes() + targets + fits + config.num_trials * work.student_bytes + TRAINED_BYTES * trained


def traffic_bytes(work: TrialWork, total_workers: int) -> float:
    """What goes to and from storage: every worker of every trial reads the dense weights; each trial writes its model."""
    num_trials = work.config.num_trials
    shards_of_moments = 2 * (1 if work.streamed else total_workers) * work.shape.moments_bytes()
    read = work.dense_bytes * (total_workers + num_trials * work.workers)
    return read + num_trials * work.student_bytes + shards_of_moments
