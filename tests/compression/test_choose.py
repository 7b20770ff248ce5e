"""Selections pick what their measure says, and leave the protected blocks alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_affine, make_ids, make_model, moments_of
from shoal.checkpoints.hashes import hash_weights
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.moments import Moments
from shoal.linearity.scores import score_blocks
from shoal.measure.perplexity import score_windows
from shoal.measure.size_and_speed import measure_size
from shoal.measure.targets import measure_targets
from shoal.recipe import Recipe
from shoal.replace.choose import choose_blocks, protected_blocks
from shoal.replace.in_order import fit_in_order
from shoal.replace.judge import Judge
from shoal.replace.look_ahead import LookAhead, list_moves
from shoal.replace.maps import apply_replacement
from shoal.text.windows import TokenWindows
from shoal.units import list_places, name_units

D = 8


def recipe(num_replaced: int, selection: str = "linearity", **changes) -> Recipe:
    return Recipe(base_model="tiny", num_replaced=num_replaced, selection=selection, **changes)


def moments_with(noise: list[float], step: list[float]) -> Moments:
    """Blocks whose nonlinear part and whose affine part are of the given sizes."""
    generator = torch.Generator().manual_seed(0)
    streams = [torch.randn(400, D, dtype=torch.float64, generator=generator)]
    for block_noise, block_step in zip(noise, step, strict=True):
        draw = torch.randn(400, D, dtype=torch.float64, generator=generator)
        turn = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=generator)).Q
        streams.append(streams[-1] + block_step * streams[-1] @ turn + block_noise * draw)
    return moments_of(torch.stack(streams))


NOISE = [0.0, 0.9, 0.1, 0.3, 0.02, 0.9, 0.2, 0.0]
STEP = [0.0, 0.0, 0.9, 0.0, 0.8, 0.1, 0.0, 0.0]


@pytest.mark.parametrize(
    ("selection", "num_replaced", "expected"),
    [
        ("linearity", 1, (4,)), ("linearity", 2, (2, 4)), ("linearity", 3, (2, 4, 6)), ("linearity", 6, (1, 2, 3, 4, 5, 6)),
        ("cosine", 1, (6,)), ("cosine", 2, (3, 6)),
        ("window", 1, (6,)), ("window", 2, (5, 6)), ("window", 6, (1, 2, 3, 4, 5, 6)),
    ],
)  # fmt: skip
def test_selections_pick_what_their_measure_says(selection, num_replaced, expected):
    """Block 4 is most linear and turns the stream; block 6 turns nothing and adds a little noise."""
    assert choose_blocks(recipe(num_replaced, selection), moments_with(NOISE, STEP)) == expected


@pytest.mark.parametrize("num_replaced", [1, 2, 3, 4, 5])
def test_a_window_is_the_contiguous_run_of_highest_cosine(num_replaced):
    moments = moments_with(NOISE, STEP)
    blocks = choose_blocks(recipe(num_replaced, "window"), moments)
    assert blocks == tuple(range(blocks[0], blocks[0] + num_replaced))
    runs = {start: float(moments.similarity[start, start + num_replaced]) for start in range(1, 8 - num_replaced)}
    assert blocks[0] == max(runs, key=runs.__getitem__)


def test_first_last_and_sink_moving_blocks_stay():
    moments = moments_with(NOISE, STEP)
    assert protected_blocks(score_blocks(moments)) == {0, 7}
    moments.sink_norm_ratio[3:6] *= 100  # made by block 2, erased by block 5
    assert protected_blocks(score_blocks(moments)) == {0, 2, 5, 7}
    assert choose_blocks(recipe(4), moments) == (1, 3, 4, 6)
    assert choose_blocks(recipe(2, "window"), moments) == (3, 4)


@pytest.mark.parametrize("selection", ["linearity", "cosine", "window", "kl"])
def test_too_many_blocks_are_refused_with_the_number_there_is(selection):
    message = r"num_replaced=7 is more than the 6 replaceable blocks of 8 \(blocks \[0, 7\] stay.*choose 6 or fewer"
    with pytest.raises(ValueError, match=message):
        choose_blocks(recipe(7, selection), moments_with(NOISE, STEP))


def test_a_window_where_none_fits_is_refused():
    moments = moments_with(NOISE, STEP)
    moments.sink_norm_ratio[3:6] *= 100
    with pytest.raises(ValueError, match=r"no 3 neighbouring blocks can all be replaced: .* \[1, 3, 4, 6\]"):
        choose_blocks(recipe(3, "window"), moments)


def test_listed_blocks_are_taken_even_if_protected():
    listed = recipe(2, "listed", blocks=(7, 0))
    assert choose_blocks(listed, moments_with(NOISE, STEP)) == (0, 7)


@pytest.mark.parametrize(
    ("blocks", "message"), [((3, 8), r"blocks \[8\] do not exist"), (tuple(range(8)), "at least one must stay")]
)
def test_listed_blocks_that_cannot_be_are_refused(blocks, message):
    with pytest.raises(ValueError, match=message):
        choose_blocks(recipe(len(blocks), "listed", blocks=blocks), moments_with(NOISE, STEP))


def test_nothing_replaced_needs_no_scores():
    assert choose_blocks(recipe(0), Moments.zeros(5, 8, "empty")) == ()


class Table:
    """A judge that knows what each set of blocks costs; others cost much."""

    def __init__(self, **costs: float):
        self.costs = {frozenset(list_places(map(int, name.strip("_").split("_")))): cost for name, cost in costs.items()}
        self.parts, self.world_size = [None] * 8, 1

    def read(self, _candidates, *, quick: bool = False) -> None:
        pass

    def cost(self, places: frozenset[int], *, quick: bool = False) -> float:
        return self.costs.get(places, len(places))


def look(num_replaced: int, judge: Table, blocks: range = range(1, 7)) -> tuple[int | str, ...]:
    moves = list_moves(blocks, ())
    return name_units(LookAhead(judge, moves, lambda places: len(places) / 2, num_replaced).find()[0])


def test_a_greedy_set_grows_by_what_costs_least_with_the_others_gone():
    """Block 6 is cheapest alone; together with it, block 1 is."""
    assert look(3, Table(_6=0.1, _1_6=0.2, _1_2_6=0.3)) == (1, 2, 6)


def test_a_long_run_is_found_that_no_step_leads_to():
    assert look(3, Table(_6=0.1, _1_6=0.2, _1_2_6=0.3, _3_4_5=0.25)) == (3, 4, 5)


def test_a_swap_is_found_that_no_step_leads_to():
    """From 1, 2, 6 by one swap to 1, 2, 4, which is no run and not greedy."""
    assert look(3, Table(_6=0.1, _1_6=0.2, _1_2_6=0.3, _1_2_4=0.2, _1_2=3.0, _1_4=3.9, _4=1.9)) == (1, 2, 4)


@pytest.fixture(scope="module")
def measured():
    """A model, text to fit on, text to choose on and what the model says of it."""
    model, windows = make_model("llama"), TokenWindows(make_ids(64, 32), "random")
    make_affine(model, 3)
    held_out = TokenWindows(make_ids(8, 32, seed=1), "held out")
    return model, windows, held_out, measure_targets(model, held_out)


@pytest.mark.parametrize("changes", [{}, {"kind": "low_rank", "rank": 4}, {"kind": "dropped"}, {"ridge": 0.1}])
@pytest.mark.parametrize("units", [(3,), (1, 2), ("1.mlp", 2), (1, "2.attention")])
def test_the_judge_says_what_the_model_with_its_maps_says(measured, changes, units):
    """One walk without a refit from the dense streams is what the judge fits, as far as the first run goes."""
    model, windows, held_out, dense = measured
    wanted = recipe(1, "kl", **changes)
    fitted = fit_in_order(
        model, units, windows, kind=wanted.kind, rank=wanted.rank, ridge=wanted.ridge, refit_outputs=False
    )
    student = copy.deepcopy(model)
    apply_replacement(student, fitted)
    places = frozenset(list_places(units))
    judge = Judge(model, windows, held_out, dense, wanted)
    expected = float(score_windows(student, held_out, dense).kl.mean())
    assert judge.cost(places) == pytest.approx(expected, rel=5e-2, abs=1e-5)
    assert judge.cost(places, quick=True) == pytest.approx(expected, rel=0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "units"), [("linear", (1, 2)), ("linear", ("1.mlp", 3)), ("dropped", (2,)), ("folded", (2, 3))]
)
def test_finalists_cost_what_the_model_that_is_made_costs(measured, kind, units):
    model, windows, held_out, dense = measured
    before = hash_weights(model)
    judge = Judge(model, windows, held_out, dense, recipe(1, "kl", kind=kind))
    (cost,) = judge.read_in_order([frozenset(list_places(units))])
    student = copy.deepcopy(model)
    apply_replacement(student, fit_in_order(model, units, judge.few, kind=kind))
    assert cost == pytest.approx(float(score_windows(student, held_out, dense).kl.mean()), rel=1e-3, abs=1e-6)
    assert hash_weights(model) == before, "the model has its weights again"


def test_what_is_fitted_in_order_decides_between_the_last():
    class Refitted(Table):
        def read_in_order(self, finalists: list[frozenset[int]]) -> list[float]:
            return [{(3, 4): 0.1}.get(name_units(places), 0.5) for places in finalists]

        def remember(self) -> None:
            pass

    judge = Refitted(_1=0.1, _1_2=0.2, _3_4=0.24)
    moments = moments_with(NOISE, STEP)
    assert name_units(LookAhead(judge, list_moves(range(1, 7), ()), lambda p: len(p) / 2, 2).find()[0]) == (1, 2)
    assert choose_blocks(recipe(2, "kl"), moments, judge=lambda: judge) == (3, 4)


def test_a_choice_goes_on_from_what_another_found(measured, tmp_path):
    model, windows, held_out, dense = measured
    moments = measure_moments(model, windows)

    def choose(**changes) -> tuple[tuple[int | str, ...], Judge]:
        wanted = recipe(2, "kl", fit="independent", **changes)
        judge = Judge(model, windows, held_out, dense, wanted, kept_in=tmp_path)
        return choose_blocks(wanted, moments, judge=lambda: judge), judge

    first, _ = choose()
    again, judge = choose()
    assert again == first and "streams" not in vars(judge), "nothing is computed again"
    assert "quick" in vars(choose(ridge=0.5)[1]), "other maps cost something else"


def choose_on_rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(choose_parts(folder), folder / f"{rank}.pt")
    dist.destroy_process_group()


def choose_parts(folder: Path) -> tuple[tuple[int | str, ...], int, int]:
    """The units, how many costs are known, and how many maps this process fitted for that."""
    model, windows = make_model("llama"), TokenWindows(make_ids(32, 32), "random")
    held_out = TokenWindows(make_ids(8, 32, seed=1), "held out")
    wanted = Recipe(base_model="tiny", parameters=0.8, parts=True, selection="kl")
    judge = Judge(model, windows, held_out, measure_targets(model, held_out), wanted, kept_in=folder)
    units = choose_blocks(wanted, measure_moments(model, windows), judge=lambda: judge)
    return units, len(judge.costs), len(judge.maps)


def test_ranks_look_at_candidates_side_by_side_and_choose_what_one_does(tmp_path):
    torch.multiprocessing.spawn(choose_on_rank, (2, tmp_path), nprocs=2)
    (units, num_costs, num_maps), other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    (tmp_path / "alone").mkdir()
    assert (units, num_costs) == other[:2] == (alone := choose_parts(tmp_path / "alone"))[:2]
    assert max(num_maps, other[2]) < alone[2], "each fits its share"


def test_the_choice_of_one_is_brute_force(measured):
    model, windows, held_out, dense = measured
    before, judge = hash_weights(model), Judge(model, windows, held_out, dense, recipe(1, "kl"))
    cheapest = min((1, 2, 3), key=lambda block: judge.cost(frozenset(list_places([block]))))
    moments = measure_moments(model, windows)
    assert choose_blocks(recipe(1, "kl"), moments, judge=lambda: judge) == (cheapest,) == (3,)
    assert hash_weights(model) == before


@pytest.mark.parametrize("share", [0.9, 0.8])
@pytest.mark.parametrize("parts", [True, False])
def test_a_budget_of_parameters_is_kept(measured, share, parts):
    model, windows, held_out, dense = measured
    wanted = Recipe(base_model="tiny", parameters=share, parts=parts, selection="kl")
    units = choose_blocks(
        wanted, measure_moments(model, windows), judge=lambda: Judge(model, windows, held_out, dense, wanted)
    )
    student = copy.deepcopy(model)
    apply_replacement(student, fit_in_order(model, units, windows))
    assert student.num_parameters() <= share * model.num_parameters()
    assert parts or all(isinstance(unit, int) for unit in units)


@pytest.mark.parametrize("parts", [True, False])
def test_a_budget_of_the_cache_is_kept(measured, parts):
    model, (_, windows, held_out, _) = make_model("llama"), measured
    wanted = Recipe(base_model="tiny", kv_cache=0.6, parts=parts)
    judge = Judge(model, windows, held_out, measure_targets(model, held_out), wanted)
    units = choose_blocks(wanted.settle(), measure_moments(model, windows), judge=lambda: judge)
    student = copy.deepcopy(model)
    apply_replacement(student, fit_in_order(model, units, windows))
    kept, whole = (measure_size(one).kv_bytes_per_token for one in (student, model))
    assert kept == pytest.approx(0.6 * whole, rel=0.05), "where an attention was, tokens are still counted"
    assert not [unit for unit in units if str(unit).endswith("mlp")], "an MLP has no cache"


def test_a_budget_out_of_reach_names_the_nearest(measured):
    model, windows, held_out, dense = measured
    wanted = Recipe(base_model="tiny", parameters=0.01, selection="kl")
    with pytest.raises(ValueError, match=r"parameters=0.01 is out of reach: .* 0\.\d\d of the dense model's is left"):
        choose_blocks(wanted, measure_moments(model, windows), judge=lambda: Judge(model, windows, held_out, dense, wanted))
