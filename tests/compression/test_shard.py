"""Students and teachers spread over the ranks learn what one rank with whole models learns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_ids, make_model
from shoal.checkpoints.hashes import hash_weights
from shoal.checkpoints.load import load_model
from shoal.distil.run import DistillationRun
from shoal.distil.teacher import Lesson
from shoal.large.on_disk import copy_model, is_on_disk
from shoal.large.shard import is_sharded, local
from shoal.measure.targets import measure_targets
from shoal.models.structure import find_blocks
from shoal.recipe import Distillation
from shoal.replace.maps import AffineMap, Replacement, apply_replacement
from shoal.text.windows import TokenWindows
from torch import Tensor

WINDOWS = TokenWindows(make_ids(16, 16), "train")
HELD_OUT = TokenWindows(make_ids(8, 16, seed=1), "held out")
NUM_STEPS, RESUMED_AT = 6, 4
WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]


@dataclass(frozen=True)
class Case:
    """A way to train: the family, settings, and whether the teacher's targets were measured before."""

    family: str
    trained: str
    changes: dict
    measured: bool = True
    dtype: str = "float32"


CASES = {
    "maps": Case("llama", "maps", {}),
    "lora": Case("llama", "lora", {}),
    "all, tied embeddings": Case("llama", "all", {}),
    "lora in Conv1D": Case("gpt2", "lora", {}),
    "unequal shares": Case("mistral", "lora", {"windows_per_step": 3, "windows_per_pass": 1}),
    "one window a step": Case("mistral", "lora", {"windows_per_step": 1}),
    "checkpointed": Case("mistral", "lora", {"gradient_checkpointing": True}),
    "with the teacher's streams": Case("llama", "lora", {"loss": {"layer_mse": 1.0, "cosine": 1.0}}),
    "with its logits too": Case("llama", "lora", {"loss": {"square_head": 1.0}}, measured=False),
    "in float16": Case("llama", "lora", {}, dtype="float16"),
}


def make_run(case: Case, folder: Path, *, streamed: bool) -> DistillationRun:
    """Of a model without block 2, which a map stands for, if maps are trained, and nothing else."""
    teacher = load_model(str(folder / case.family), dtype=case.dtype, streamed=streamed)
    student = copy_model(teacher)
    maps = {} if case.family == "gpt2" else {2: AffineMap(torch.zeros(32, 32), torch.zeros(32))}
    apply_replacement(student, Replacement((2,), maps))
    changes = {"window": 16, "windows_per_step": 4, "learning_rate": 3e-3, "lora_rank": 4, **case.changes}
    num_tokens = NUM_STEPS * 16 * changes["windows_per_step"]
    settings = Distillation(num_tokens=num_tokens, trained=case.trained, **changes)
    measured = [measure_targets(teacher, windows) for windows in (WINDOWS, HELD_OUT)]
    lesson = Lesson(WINDOWS, measured[0] if case.measured else None, HELD_OUT, measured[1])
    run = DistillationRun(student, teacher, lesson, settings, replaced=(2,))
    if case.dtype == "float16":  # overflows at first, which all ranks have to notice
        run.descent.scaler.load_state_dict(run.descent.scaler.state_dict() | {"scale": 2.0**40})
    return run


def result_of(run: DistillationRun) -> tuple[list[dict], Tensor | None]:
    """All metrics, and what the finished student says to the held-out windows, where this rank has it."""
    metrics = list(run)
    student = run.finish()
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    return metrics, student(input_ids=HELD_OUT.ids).logits.detach() if is_first else None


def train_on_rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    found = {}
    for name, case in CASES.items():
        run = make_run(case, folder, streamed=True)
        parameters = list(run.student.parameters())
        assert all(is_sharded(parameter) for parameter in parameters)
        held, total = sum(local(p).numel() for p in parameters), sum(p.numel() for p in parameters)
        assert held <= 1.1 * total / world, "rows that do not divide evenly are padded, and no more"
        found[name] = result_of(run)
        assert is_on_disk(run.finish())
    begun = make_run(CASES["lora"], folder, streamed=True)
    for metrics in begun:
        if metrics["step"] == RESUMED_AT:
            break
    state = begun.state_dict()
    begun.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    found["resumed"] = result_of(begun)
    if rank == 0:
        torch.save((found, state), folder / f"found-{world}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models of several shards, and the state of a run of whole models that was cut off."""
    folder = tmp_path_factory.mktemp("models")
    for family in {case.family for case in CASES.values()}:
        make_model(family).save_pretrained(folder / family, max_shard_size=20_000)
    begun = make_run(CASES["lora"], folder, streamed=False)
    next(metrics for metrics in begun if metrics["step"] == RESUMED_AT)
    torch.save(begun.state_dict(), folder / "state.pt")
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, tuple[list[dict], Tensor]]:
    return {name: result_of(make_run(case, folder, streamed=False)) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=WORLDS)
def shared(request, folder) -> tuple[dict[str, tuple[list[dict], Tensor]], dict]:
    before = hash_weights(load_model(str(folder / "llama"), dtype="float32"))
    torch.multiprocessing.spawn(train_on_rank, (request.param, folder), nprocs=request.param)
    assert hash_weights(load_model(str(folder / "llama"), dtype="float32")) == before, "the files are only read"
    return torch.load(folder / f"found-{request.param}.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_ranks_that_share_the_weights_learn_what_one_does(alone, shared, name):
    (expected, logits), (found, shared_logits) = alone[name], shared[0][name]
    assert [metrics.keys() for metrics in found] == [metrics.keys() for metrics in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3), one["step"]
    torch.testing.assert_close(shared_logits, logits, rtol=1e-2, atol=1e-3)
    assert expected[-1]["held_out_kl"] != pytest.approx(expected[0]["held_out_kl"], rel=1e-2), "nothing was learned"


def test_a_run_goes_on_from_what_another_number_of_ranks_left(alone, shared, folder):
    """From the state of one rank with whole models here, and the other way about below."""
    expected, logits = alone["lora"]
    metrics, found = shared[0]["resumed"]
    assert metrics == [pytest.approx(one, rel=1e-3) for one in expected if one["step"] > RESUMED_AT]
    torch.testing.assert_close(found, logits, rtol=1e-2, atol=1e-3)


def test_one_rank_goes_on_from_what_several_left(alone, shared, folder):
    run = make_run(CASES["lora"], folder, streamed=False)
    run.load_state_dict(shared[1])
    metrics, found = result_of(run)
    expected, logits = alone["lora"]
    assert metrics == [pytest.approx(one, rel=1e-3) for one in expected if one["step"] > RESUMED_AT]
    torch.testing.assert_close(found, logits, rtol=1e-2, atol=1e-3)


def test_a_streamed_model_is_not_trained_by_a_process_alone(folder):
    with pytest.raises(ValueError, match=r"run\.streamed"):
        make_run(CASES["lora"], folder, streamed=True)
    assert len(find_blocks(load_model(str(folder / "llama"), streamed=True))) == 5
