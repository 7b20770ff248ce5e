"""What an accelerator computes is what the processor computes: moments, choice, walk, learning, checkpoints, generation.

python -m pytest -m gpu
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_ids, make_model, write_prose
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.compression import compress, replace
from shoal.distil.run import DistillationRun
from shoal.distil.teacher import Lesson
from shoal.large.shard import is_sharded
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.scores import score_blocks
from shoal.measure.perplexity import score_windows
from shoal.measure.targets import measure_targets
from shoal.models.generate import continue_text
from shoal.recipe import KINDS, Distillation, Recipe
from shoal.replace.choose import choose_blocks
from shoal.replace.in_order import fit_in_order
from shoal.replace.judge import Judge
from shoal.replace.maps import AffineMap, Replacement, apply_replacement
from shoal.text.windows import TokenWindows
from shoal.texts import Texts
from shoal_services.serving.engine.decoder import BatchedDecoder
from transformers import PreTrainedModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
WINDOWS = TokenWindows(make_ids(32, 32), "random")
HELD_OUT = TokenWindows(make_ids(8, 32, seed=1), "held out")


@pytest.fixture
def pair(model) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny model of each family in turn: on the processor, and on the accelerator."""
    return model, copy.deepcopy(model).cuda()


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor = HELD_OUT.ids) -> torch.Tensor:
    return model(input_ids=ids.to(model.device)).logits.cpu()


def test_moments_and_scores_are_those_of_the_processor(pair):
    here, there = (score_blocks(measure_moments(model, WINDOWS)) for model in pair)
    for one, other in zip(here, there, strict=True):
        assert other.held_out == pytest.approx(one.held_out, abs=1e-3)
        assert other.cosine == pytest.approx(one.cosine, abs=1e-3)


@pytest.mark.parametrize("kind", ["linear", "low_rank", "dropped"])
def test_the_walk_makes_the_model_that_the_processor_makes(pair, kind):
    made = []
    for model in pair:
        fitted = fit_in_order(model, (1, 3), WINDOWS, kind=kind, rank=4 if kind == "low_rank" else None)
        made.append(logits_of(replace(model, fitted)))
    scale = float(made[0].abs().max())
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=2e-2 * scale)


def test_the_choice_by_kl_is_that_of_the_processor():
    chosen = []
    for device in ("cpu", "cuda"):
        model = make_model("llama").to(device)
        recipe = Recipe(base_model="llama", parameters=0.75, parts=True, selection="kl")
        judge = Judge(model, WINDOWS, HELD_OUT, measure_targets(model, HELD_OUT), recipe)
        units = choose_blocks(recipe, measure_moments(model, WINDOWS), judge=lambda judge=judge: judge)
        chosen.append(units)
    assert chosen[0] == chosen[1]


def make_run(trained: str, device: str, dtype: torch.dtype = torch.float32) -> DistillationRun:
    teacher = make_model("llama").to(device, dtype)
    student = replace(teacher, Replacement((2,), {2: AffineMap(torch.zeros(32, 32), torch.zeros(32))}))
    lesson = Lesson(WINDOWS, None, HELD_OUT)
    settings = Distillation(num_tokens=32 * 128, window=32, learning_rate=1e-3, trained=trained, lora_rank=4)
    return DistillationRun(student, teacher, lesson, settings, replaced=(2,))


@pytest.mark.parametrize("trained", ["maps", "lora", "blocks", "all"])
def test_distillation_learns_what_it_learns_on_the_processor(trained):
    here, there = (list(make_run(trained, device)) for device in ("cpu", "cuda"))
    if trained != "lora":  # its factors begin at random, and every device has its own dice
        assert there[-1]["held_out_kl"] == pytest.approx(here[-1]["held_out_kl"], rel=0.05)
    assert there[-1]["held_out_kl"] < there[0]["held_out_kl"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distillation_learns_in_half_precision(dtype):
    run = make_run("all", "cuda", dtype)
    metrics, student = list(run), run.finish()
    assert metrics[-1]["held_out_kl"] < metrics[0]["held_out_kl"]
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}


def train_on_one_rank(_rank: int, folder: Path) -> None:
    dist.init_process_group("nccl", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    make_model("llama").save_pretrained(folder / "llama", max_shard_size=20_000)
    teacher = load_model(str(folder / "llama"), dtype="float32", streamed=True)
    student = load_model(str(folder / "llama"), dtype="float32", streamed=True)
    apply_replacement(student, Replacement((2,)))
    settings = Distillation(num_tokens=32 * 128, window=32, learning_rate=1e-3, trained="all")
    targets = measure_targets(teacher, WINDOWS), measure_targets(teacher, HELD_OUT)
    run = DistillationRun(student, None, Lesson(WINDOWS, targets[0], HELD_OUT, targets[1]), settings, replaced=(2,))
    assert all(is_sharded(parameter) and parameter.is_cuda for parameter in run.student.parameters())
    metrics = list(run)
    assert metrics[-1]["held_out_kl"] < metrics[0]["held_out_kl"]
    kl = float(score_windows(run.finish(), HELD_OUT, targets[1]).kl.mean())
    assert kl == pytest.approx(min(m["held_out_kl"] for m in metrics if "held_out_kl" in m), rel=1e-2)
    dist.destroy_process_group()


def test_weights_that_are_shared_out_over_accelerators_learn(tmp_path):
    torch.multiprocessing.spawn(train_on_one_rank, (tmp_path,), nprocs=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compressed_model_says_the_same_wherever_it_is_loaded(tiny_random, tmp_path, kind):
    prose = str(write_prose(tmp_path / "prose.txt"))
    texts = Texts(train=(prose,), evaluation=(prose,), window=64, calibration_tokens=4096, evaluation_tokens=1024)
    settings = Distillation(num_tokens=2048, window=64, trained="all", learning_rate=1e-4)
    recipe = Recipe(
        base_model=tiny_random, num_replaced=2, kind=kind, rank=8 if kind == "low_rank" else None, dtype="float32",
        distillation=settings,
    )  # fmt: skip
    point = compress(recipe, tmp_path / "made", texts=texts)
    assert point.device == "cuda" and point.evaluations[0].kl < 1
    model = load_model(str(tmp_path / "made"), dtype="float32")
    assert model.device.type == "cuda"
    torch.testing.assert_close(logits_of(model), logits_of(copy.deepcopy(model).cpu()), rtol=1e-3, atol=1e-3)


def test_text_is_generated(tiny_random):
    model, tokenizer = load_model(tiny_random), load_tokenizer(tiny_random)
    assert isinstance(continue_text(model, tokenizer, "The sea", num_new=8), str)


@pytest.mark.parametrize("units", [(1, 2), ("1.attention", "2.mlp", 3)])
def test_the_engine_says_what_the_model_says_without_a_cache(units):
    dense = make_model("llama").cuda()
    model = replace(dense, fit_in_order(dense, units, WINDOWS))
    decoder = BatchedDecoder(model, max_batch_size=2)
    ids = make_ids(1, 9)[0].tolist()
    token = int(decoder.prefill(ids, room=16)[-1].argmax())
    for _ in range(8):
        ids.append(token)
        assert token == int(logits_of(model, torch.tensor([ids[:-1]]))[0, -1].argmax())
        token = int(decoder.step([token]).argmax(-1)[0])
