"""Students learn, runs resume, and neither passes, caches nor ranks change what is learned."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_ids, make_model
from shoal.distil.run import DistillationRun, Diverged
from shoal.distil.teacher import Lesson
from shoal.measure.perplexity import score_windows
from shoal.measure.targets import measure_targets
from shoal.models.projections import find_projections, find_zeros
from shoal.models.structure import find_blocks
from shoal.recipe import Distillation
from shoal.replace.maps import AffineMap, Replacement, apply_replacement
from shoal.text.windows import TokenWindows
from shoal.thin.sparsify import sparsify
from shoal.thin.svd import factor_weights
from transformers.pytorch_utils import Conv1D

WINDOWS = TokenWindows(make_ids(16, 16), "train")
HELD_OUT = TokenWindows(make_ids(8, 16, seed=1), "held out")
LOSSES = [{}, {"layer_mse": 1}, {"square_head": 1}, {"cosine": 1}, {"layer_mse": 1, "square_head": 1, "cosine": 1}]


@pytest.fixture
def teacher():
    return make_model("llama")


def make_student(teacher, *, blocks: tuple[int, ...] = (2,), kind: str = "linear"):
    student = copy.deepcopy(teacher)
    identity = AffineMap(torch.zeros(32, 32), torch.zeros(32))
    apply_replacement(student, Replacement(blocks, {} if kind == "dropped" else {blocks[0]: identity}))
    return student


def settings(num_steps: int = 24, **changes) -> Distillation:
    changes = {"window": 16, "windows_per_step": 4, "learning_rate": 3e-3, "lora_rank": 4, "trained": "maps", **changes}
    return Distillation(num_tokens=num_steps * changes["window"] * changes["windows_per_step"], **changes)


def make_run(teacher, *, student=None, lesson: Lesson | None = None, blocks=(2,), **changes) -> DistillationRun:
    student = student if student is not None else make_student(teacher, blocks=blocks)
    return DistillationRun(student, teacher, lesson or Lesson(WINDOWS), settings(**changes), replaced=blocks)


def losses_of(run: DistillationRun) -> list[float]:
    return [metrics["loss"] for metrics in run if "loss" in metrics]


def held_out_kl(model, teacher) -> float:
    return float(score_windows(model, HELD_OUT, measure_targets(teacher, HELD_OUT)).kl.mean())


def assert_same_weights(found, expected, **tolerance) -> None:
    for (name, p), (other, q) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(p, q, **tolerance)


@pytest.mark.parametrize("kind", ["linear", "dropped"])
@pytest.mark.parametrize("trained", ["maps", "lora", "blocks", "all"])
def test_every_way_to_train_lowers_the_divergence(teacher, trained, kind):
    if (trained, kind) == ("maps", "dropped"):
        pytest.skip("nothing to train: refused, see below")
    student = make_student(teacher, kind=kind)
    before = held_out_kl(student, teacher)
    untouched = student.lm_head.weight.clone()
    run = make_run(teacher, student=student, lesson=Lesson(WINDOWS, held_out=HELD_OUT), trained=trained)
    checks = [metrics["held_out_kl"] for metrics in run if "held_out_kl" in metrics]
    student = run.finish()
    assert checks[0] == pytest.approx(before, rel=1e-6)
    assert held_out_kl(student, teacher) == pytest.approx(min(checks), rel=1e-4)
    assert min(checks) < 0.97 * before
    assert not any(p.requires_grad for p in student.parameters())
    assert not any("lora" in name for name, _ in student.named_parameters())
    assert torch.equal(student.lm_head.weight, untouched) == (trained != "all")


def test_only_maps_change_where_only_maps_are_trained(teacher):
    student = make_student(teacher)
    run = make_run(teacher, student=student, num_steps=2)
    list(run)
    dense = dict(teacher.named_parameters())
    kept = {name: p for name, p in run.finish().named_parameters() if "linear_" not in name}
    assert len(kept) == len(dense) - len(list(find_blocks(teacher)[2].parameters()))
    assert all(any(torch.equal(p, q) for q in dense.values() if q.shape == p.shape) for p in kept.values())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("logit_kl", [0, 1])
@pytest.mark.parametrize("blocks", [(0,), (2, 3), (4,)])
def test_every_loss_goes_down(teacher, loss, logit_kl, blocks):
    if not loss and not logit_kl:
        pytest.skip("no loss at all: refused by the recipe")
    run = make_run(
        teacher, blocks=blocks, num_steps=12, loss={"logit_kl": logit_kl, **loss}, windows_per_step=16, windows_per_pass=16
    )
    losses = losses_of(run)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("loss", LOSSES[1:])
@pytest.mark.parametrize("blocks", [(0,), (2, 3), (1, 4)])
def test_a_perfect_student_has_nothing_to_learn(teacher, loss, blocks):
    """Blocks that do nothing, replaced by maps that do nothing: student and teacher streams are compared in step."""
    with torch.no_grad():
        for block in blocks:
            find_blocks(teacher)[block].self_attn.o_proj.weight.zero_()
            find_blocks(teacher)[block].mlp.down_proj.weight.zero_()
    run = make_run(teacher, student=make_student(teacher, blocks=blocks), blocks=blocks, loss=loss, num_steps=1)
    assert losses_of(run)[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("trained", ["maps", "lora", "blocks", "all"])
def test_checkpointed_gradients_are_the_same_and_hold_less(teacher, trained):
    losses, held = [], []
    for checkpointed in (False, True):
        run = make_run(
            teacher, trained=trained, num_steps=4, loss={"logit_kl": 1, "layer_mse": 1}, gradient_checkpointing=checkpointed
        )
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            losses.append(losses_of(run))
        held.append(sum(sizes))
        assert not run.finish().is_gradient_checkpointing
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert held[1] < 0.6 * held[0]


def save_and_load(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("trained", ["maps", "lora", "blocks", "all"])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(teacher, trained, stop):
    lesson = Lesson(WINDOWS, held_out=HELD_OUT)
    whole, first, second = (make_run(teacher, lesson=lesson, trained=trained, num_steps=8) for _ in range(3))
    metrics = list(whole)
    list(itertools.islice(first, 1 + stop))  # the first yield is the check before any step
    second.load_state_dict(save_and_load(first.state_dict()))
    assert list(second) == metrics[1 + stop :]
    assert_same_weights(second.finish(), whole.finish(), rtol=0, atol=0)


@pytest.mark.parametrize("windows_per_pass", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_passes_do_not_change_the_step(teacher, windows_per_pass, loss):
    one, many = (make_run(teacher, windows_per_pass=count, num_steps=6, loss=loss) for count in (4, windows_per_pass))
    assert losses_of(many) == pytest.approx(losses_of(one), rel=1e-4)
    assert_same_weights(many.finish(), one.finish(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_targets_measured_before_teach_like_the_teacher(teacher, temperature):
    cached = Lesson(WINDOWS, measure_targets(teacher, WINDOWS, temperatures=(1.0, temperature)[temperature == 1.0 :]))
    live = make_run(teacher, temperature=temperature, num_steps=6)
    without = DistillationRun(make_student(teacher), None, cached, settings(6, temperature=temperature), replaced=(2,))
    assert losses_of(without) == pytest.approx(losses_of(live), rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"loss": {"logit_kl": 0, "cosine": 1}}])
def test_what_needs_the_teacher_is_refused_without_it(teacher, changes):
    with pytest.raises(ValueError, match="give teacher"):
        DistillationRun(make_student(teacher), None, Lesson(WINDOWS), settings(**changes), replaced=(2,))


def test_maps_cannot_be_trained_where_there_are_none(teacher):
    with pytest.raises(ValueError, match="nothing to train: trained='maps' needs kind='linear'"):
        make_run(teacher, student=make_student(teacher, kind="dropped"))


def test_an_absurd_learning_rate_diverges_and_keeps_the_last_good_weights(teacher):
    run = make_run(teacher, lesson=Lesson(WINDOWS, held_out=HELD_OUT), trained="all", learning_rate=1e30)
    with pytest.raises(Diverged, match=r"at step \d of 24 with learning_rate=1e\+30.*use a lower learning rate"):
        list(run)
    assert_same_weights(run.finish(), make_student(teacher), rtol=0, atol=0)


def test_poisoned_weights_diverge_at_once(teacher):
    student = make_student(teacher)
    with torch.no_grad():
        student.model.norm.weight.fill_(torch.nan)
    with pytest.raises(Diverged, match="became nan at step 1"):
        list(make_run(teacher, student=student))


def test_the_best_checked_weights_are_the_ones_that_stay(teacher):
    """A learning rate far too high makes all later checks worse than the first."""
    run = make_run(teacher, lesson=Lesson(WINDOWS, held_out=HELD_OUT), learning_rate=1.0, num_steps=8)
    checks = [metrics["held_out_kl"] for metrics in run if "held_out_kl" in metrics]
    assert min(checks[1:]) > checks[0]
    assert_same_weights(run.finish(), make_student(teacher), rtol=0, atol=0)


def test_patience_stops_early(teacher):
    lesson = Lesson(WINDOWS, held_out=HELD_OUT)
    patient, impatient = (list(make_run(teacher, lesson=lesson, learning_rate=1.0, patience=p)) for p in (None, 2))
    assert patient[-1]["step"] == 24
    assert sum("held_out_kl" in metrics for metrics in impatient) == 3  # the first, and two in vain
    assert impatient == patient[: len(impatient)]


def test_the_learning_rate_warms_up_and_falls_to_nothing(teacher):
    rates = [metrics["learning_rate"] for metrics in make_run(teacher, num_steps=20, warmup_fraction=0.2)]
    assert rates[:4] == sorted(rates[:4])
    assert rates[4] == max(rates) == pytest.approx(3e-3)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.02 * rates[4]


def test_every_window_is_seen_once_an_epoch(teacher):
    descent = make_run(teacher, windows_per_step=3).descent
    seen = [row for step in range(16) for row in descent.rows_of_step(step).tolist()]
    assert [sorted(seen[i : i + 16]) for i in (0, 16, 32)] == [list(range(16))] * 3
    assert seen[:16] != seen[16:32]


def gradient_near_optimum(dtype: torch.dtype) -> torch.Tensor:
    """Of a map that is nearly the identity in the place of a block that does nothing, over the mean of 4,096 tokens."""
    teacher, many = make_model("llama"), TokenWindows(make_ids(64, 64), "train")
    with torch.no_grad():
        find_blocks(teacher)[2].self_attn.o_proj.weight.zero_()
        find_blocks(teacher)[2].mlp.down_proj.weight.zero_()
    teacher, student = teacher.to(dtype), copy.deepcopy(teacher).to(dtype)
    small = 3e-3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    apply_replacement(student, Replacement((2,), {2: AffineMap(small, torch.zeros(32))}))
    run = make_run(teacher, student=student, lesson=Lesson(many), num_steps=1, windows_per_step=64, windows_per_pass=64)
    found: list[torch.Tensor] = []
    run.descent.optimizer.register_step_pre_hook(
        lambda *_: found.append(torch.cat([p.grad.flatten() for p in run.trained]))
    )
    list(run)
    return found[0]


def test_float16_has_gradients_near_the_optimum():
    """They are below float16's least number unless the loss is scaled."""
    exact, found = gradient_near_optimum(torch.float32), gradient_near_optimum(torch.float16)
    assert float(torch.nn.functional.cosine_similarity(found, exact, dim=0)) > 0.99
    assert float(found.norm()) == pytest.approx(float(exact.norm()), rel=0.02)


def set_loss_scale(run: DistillationRun, scale: float) -> None:
    run.descent.scaler.load_state_dict(run.descent.scaler.state_dict() | {"scale": scale})


def test_a_step_whose_gradients_overflow_is_taken_again_with_a_smaller_scale():
    plain, begun = (make_run(make_model("llama").half(), num_steps=4) for _ in range(2))
    set_loss_scale(begun, 2.0**40)
    assert losses_of(begun) == pytest.approx(losses_of(plain), rel=1e-3)
    assert 1 < begun.descent.scaler.get_scale() < 2.0**40


def test_the_loss_scale_is_part_of_the_state():
    first, second = (make_run(make_model("llama").half(), num_steps=2) for _ in range(2))
    set_loss_scale(first, 512.0)
    second.load_state_dict(save_and_load(first.state_dict()))
    assert second.descent.scaler.get_scale() == 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gradient_that_is_not_finite_diverges_and_leaves_the_weights(teacher, dtype):
    """A finite loss with an infinite slope."""
    run = make_run(teacher.to(dtype))
    before = run.descent.copy_weights()
    with pytest.raises(Diverged, match=r"the gradient became (inf|nan) at step 1"):
        run.descent.take_step(lambda _rows: (run.trained[0] * 0).sum().sqrt()[None])
    assert all(torch.equal(now, then) for now, then in zip(run.descent.copy_weights(), before, strict=True))


STEPS_OF_RANKS = (4, 3, 1)  # shared equally, unequally, and with nothing to do for one
DTYPES_OF_RANKS = (torch.float32, torch.float32, torch.float16)


def train_on_rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    found = []
    for windows_per_step, dtype in zip(STEPS_OF_RANKS, DTYPES_OF_RANKS, strict=True):
        run = make_run(make_model("llama").to(dtype), num_steps=6, windows_per_step=windows_per_step)
        if dtype == torch.float16:
            set_loss_scale(run, 2.0**40)  # overflows on all of them
        found.append((losses_of(run), list(run.finish().parameters())))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_learn_what_one_does(teacher, world, tmp_path):
    torch.multiprocessing.spawn(train_on_rank, (world, tmp_path), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for windows_per_step, dtype, *found in zip(STEPS_OF_RANKS, DTYPES_OF_RANKS, *ranks, strict=True):
        alone = make_run(teacher.to(dtype), num_steps=6, windows_per_step=windows_per_step)
        expected, parameters = losses_of(alone), list(alone.finish().parameters())
        for losses, weights in found:
            assert losses == pytest.approx(expected, rel=1e-4)
            for p, q in zip(weights, parameters, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)


def test_the_seed_is_all_the_randomness_there_is(teacher):
    students, state = [make_student(teacher) for _ in range(3)], torch.random.get_rng_state()
    first, same, other = (
        DistillationRun(student, teacher, Lesson(WINDOWS), settings(trained="lora"), replaced=(2,), seed=seed)
        for student, seed in zip(students, (3, 3, 4), strict=True)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(first.trained, same.trained, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(first.trained, other.trained, strict=True))
    order, as_before, another = (run.descent.rows_of_step(0).tolist() for run in (first, same, other))
    assert order == as_before != another


@pytest.mark.parametrize("trained", ["maps", "lora", "blocks", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_zeros_stay_and_the_rest_learns(trained, family):
    """The checks while it trains are of the model that is left at the end: nothing is pruned after the last of them."""
    teacher = make_model(family)
    student = make_student(teacher)
    sparsify(student, WINDOWS, "2:4")
    zeros, before = find_zeros(student), held_out_kl(student, teacher)
    names = [name for name, _ in student.named_parameters()]
    run = DistillationRun(
        student, teacher, Lesson(WINDOWS, held_out=HELD_OUT), settings(trained=trained, loss={"square_head": 1.0}),
        replaced=(2,), keep_zeros=True,
    )  # fmt: skip
    checks = [metrics["held_out_kl"] for metrics in run if "held_out_kl" in metrics]
    student = run.finish()
    assert sorted(name for name, _ in student.named_parameters()) == sorted(names)
    for name, zero in find_zeros(student).items():
        assert torch.equal(zero, zeros[name]), name
    assert checks[0] == pytest.approx(before, rel=1e-5)
    assert held_out_kl(student, teacher) == pytest.approx(min(checks), rel=1e-4)
    assert min(checks) < 0.97 * before
    assert all(type(module) in (torch.nn.Linear, Conv1D) for module in find_projections(student).values())


def test_lora_without_keep_zeros_fills_them(teacher):
    """What the masks are for."""
    student = make_student(teacher)
    sparsify(student, WINDOWS, "2:4")
    run = make_run(teacher, student=student, num_steps=2, trained="lora")
    list(run)
    assert not any(zero.any() for zero in find_zeros(run.finish()).values())


def test_a_sparse_run_resumes(teacher):
    def begin() -> DistillationRun:
        student = make_student(teacher)
        sparsify(student, WINDOWS, 0.5)
        lesson = Lesson(WINDOWS, held_out=HELD_OUT)
        return DistillationRun(
            student, teacher, lesson, settings(6, trained="lora"), replaced=(2,), keep_zeros=True, seed=3
        )

    whole, first, second = begin(), begin(), begin()
    list(whole)
    list(itertools.islice(first, 4))
    second.load_state_dict(first.state_dict())
    list(second)
    assert_same_weights(second.finish(), whole.finish())


def test_factors_learn_too(teacher):
    student = make_student(teacher)
    factor_weights(student, WINDOWS, 0.8)
    before = held_out_kl(student, teacher)
    run = make_run(teacher, student=student, lesson=Lesson(WINDOWS, held_out=HELD_OUT), trained="lora")
    assert run.first_changed == 0, "every block has changed, not those after the replaced one alone"
    list(run)
    assert held_out_kl(run.finish(), teacher) < 0.97 * before
