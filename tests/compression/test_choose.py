"""Selections pick what their measure says, and leave the protected blocks alone."""

from __future__ import annotations

import pytest
import torch
from conftest import make_affine, make_ids, make_model, moments_of
from shoal.checkpoints.hashes import hash_weights
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.moments import Moments
from shoal.linearity.scores import score_blocks
from shoal.measure.perplexity import score_windows
from shoal.measure.targets import measure_targets
from shoal.recipe import Recipe
from shoal.replace.choose import SHORTLIST, choose_blocks, make_kl_cost, protected_blocks
from shoal.replace.fit import fit_independent
from shoal.replace.maps import apply_replacement
from shoal.text.windows import TokenWindows

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


@pytest.mark.parametrize("selection", ["linearity", "cosine", "window", "greedy_kl"])
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


def test_greedy_adds_what_costs_least_with_the_others_in_place():
    """Block 6 is cheapest alone; together with it, block 1 is."""
    costs = {(6,): 1, (1, 6): 2, (1, 2, 6): 3}
    asked = []

    def cost(blocks: tuple[int, ...]) -> float:
        asked.append(blocks)
        return costs.get(blocks, 9)

    assert choose_blocks(recipe(3, "greedy_kl"), moments_with(NOISE, STEP), rank_by_kl=cost) == (1, 2, 6)
    assert len(asked) == len(set(asked)) == 6 + 5 + 4
    asked.clear()
    choose_blocks(recipe(1, "greedy_kl"), moments_with(NOISE, STEP), rank_by_kl=cost)
    assert len(asked) == 1 + SHORTLIST


@pytest.fixture(scope="module")
def measured():
    """A model whose block 3 is affine, its moments, and windows that those have not seen."""
    model, windows = make_model("llama"), TokenWindows(make_ids(64, 32), "random")
    make_affine(model, 3)
    held_out = TokenWindows(make_ids(8, 32, seed=1), "held out")
    return model, measure_moments(model, windows), held_out, measure_targets(model, held_out)


@pytest.mark.parametrize("changes", [{}, {"kind": "low_rank", "rank": 4}, {"kind": "dropped"}, {"ridge": 0.1}])
def test_greedy_choice_of_one_is_brute_force(measured, changes):
    import copy

    model, moments, held_out, dense = measured
    wanted, kl = recipe(1, "greedy_kl", **changes), {}
    for block in (1, 2, 3):
        student, replacement = (
            copy.deepcopy(model),
            fit_independent(moments, (block,), ridge=wanted.ridge, rank=wanted.rank),
        )
        if wanted.kind == "dropped":
            replacement.maps.clear()
        apply_replacement(student, replacement)
        kl[block] = float(score_windows(student, held_out, dense).kl.mean())
    cost = make_kl_cost(*measured, wanted)
    assert {block: cost((block,)) for block in kl} == pytest.approx(kl)
    assert choose_blocks(wanted, moments, rank_by_kl=cost) == (min(kl, key=kl.__getitem__),)


def test_greedy_finds_the_affine_block_and_changes_nothing(measured):
    model, moments, *_ = measured
    before = hash_weights(model)
    assert choose_blocks(recipe(1, "greedy_kl"), moments, rank_by_kl=make_kl_cost(*measured, recipe(1, "greedy_kl"))) == (
        3,
    )
    assert hash_weights(model) == before
    assert model.config.num_hidden_layers == 5
