"""Scores are the paper's, exactly; held out they are 1 for a linear network and nothing for noise."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import linear_network, make_ids, moments_of
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.gram import Gram
from shoal.linearity.scores import read_scores, require_calibration, score_blocks, score_gram, score_scaled, write_scores
from shoal.models.structure import find_blocks
from shoal.text.windows import TokenWindows

D = 16


def rows(num_rows: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def nearly_linear(x: torch.Tensor, *, noise: float = 0.5) -> torch.Tensor:
    return x + x @ rows(D, seed=1) / 8 + noise * torch.tanh(rows(len(x), seed=2)) + 0.7


def procrustes_similarity(x: torch.Tensor, y: torch.Tensor) -> float:
    """The authors' procedure (notes on arXiv 2405.12250 §3.1)."""
    x, y = (t - t.mean(0) for t in (x, y))
    x, y = x / x.norm(), y / y.norm()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    weight = (vh.T * (1 / s)) @ u.T @ y
    return float(1 - (x @ weight - y).square().sum())


def score_rows(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    gram = Gram.zeros(1, D, D)
    gram.add(0, x, y)
    return score_gram(gram)


@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("noise", [0.0, 0.1, 3.0])
def test_scores_are_those_of_the_paper(noise, offset):
    x = rows(300) + offset
    y = nearly_linear(x, noise=noise)
    with_residual, without = score_rows(x, y)
    assert with_residual == pytest.approx(procrustes_similarity(x, y), abs=1e-6)
    assert without == pytest.approx(procrustes_similarity(x, y - x), abs=1e-6)


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
def test_the_two_scores_are_one_fit(noise):
    """1 − score = (1 − score without residual) · ‖(Y−X) centred‖² / ‖Y centred‖²."""
    x = rows(200)
    y = nearly_linear(x, noise=noise)
    score, without = score_rows(x, y)
    energy, update_energy = ((t - t.mean(0)).square().sum() for t in (y, y - x))
    assert 1 - score == pytest.approx((1 - without) * float(update_energy / energy), rel=1e-9)


def test_scores_do_not_depend_on_scale():
    x = rows(200)
    y = nearly_linear(x)
    assert score_rows(x * 100, y * 100) == pytest.approx(score_rows(x, y), abs=1e-9)


def test_the_in_sample_scores_of_moments_are_those_of_all_their_rows():
    x = rows(200)
    y = nearly_linear(x)
    (score,) = score_blocks(moments_of(torch.stack([x, y])))
    assert (score.score, score.score_without_residual) == pytest.approx(score_rows(x, y), abs=1e-9)
    assert score.ordinary == pytest.approx(score.score)
    assert score.norm_ratio == pytest.approx(float(((y - x).norm(dim=1) / y.norm(dim=1)).mean()))
    assert score.cosine == pytest.approx(float(torch.cosine_similarity(x, y).mean()))
    assert score.identity == pytest.approx(
        float(1 - (y - x - (y - x).mean(0)).square().sum() / (y - y.mean(0)).square().sum())
    )


def test_the_held_out_score_is_that_of_a_map_that_did_not_see_the_tokens():
    x = rows(200)
    y = nearly_linear(x, noise=2)
    (score,) = score_blocks(moments_of(torch.stack([x, y])))
    ones = torch.ones(100, 1, dtype=torch.float64)
    affine = torch.linalg.lstsq(torch.cat([x[::2], ones], 1), y[::2]).solution
    error = (torch.cat([x[1::2], ones], 1) @ affine - y[1::2]).square().sum()
    assert score.held_out == pytest.approx(float(1 - error / (y[1::2] - y[1::2].mean(0)).square().sum()), abs=1e-9)


@pytest.mark.parametrize("num_rows", [200, 2000])
def test_random_targets_reach_the_noise_floor_and_no_more(num_rows):
    (score,) = score_blocks(moments_of(torch.stack([rows(num_rows), rows(num_rows, seed=9)])))
    assert score.noise_floor == pytest.approx(D / (num_rows - 1))
    # D² directions: the score of noise varies by a tenth or so.
    assert score.score == pytest.approx(score.noise_floor, rel=0.25)
    assert -3 * D / (num_rows / 2) < score.held_out < 0


def test_a_linear_network_scores_one_held_out(llama, windows):
    for score in score_blocks(measure_moments(linear_network(llama), windows)):
        assert score.held_out == pytest.approx(1, abs=1e-5)
        assert score.held_out_without_residual == pytest.approx(1, abs=1e-4)
        assert score.score == pytest.approx(1, abs=1e-5)
        assert not score.moves_sinks


def test_a_transformer_is_not_linear(llama, windows):
    scores = score_blocks(measure_moments(llama, windows))
    assert all(score.held_out_without_residual < 0.9 for score in scores)
    assert all(score.held_out < score.ordinary for score in scores)


def test_sinks_lift_the_score_and_not_the_ordinary_one(llama, windows):
    before = score_blocks(measure_moments(llama, windows))
    ids = windows.ids.clone()
    ids[:, 5] = 2  # a token that random windows do not hold
    with torch.no_grad():
        llama.get_input_embeddings().weight[2] *= 3000
    after = score_blocks(measure_moments(llama, TokenWindows(ids, "with sinks")))
    for clean, sunk in zip(before[1:], after[1:], strict=True):
        assert sunk.score > max(0.99, clean.score)
        # Attention to the sink changes the others a little.
        assert sunk.ordinary == pytest.approx(clean.ordinary, abs=0.1)
        assert sunk.held_out == pytest.approx(clean.held_out, abs=0.1)


def test_blocks_that_make_and_erase_sinks_are_named(llama, windows):
    """Block 2 makes the sixth token of a window 100 times larger, block 4 makes it ordinary again."""
    linear_network(llama)
    factor = torch.ones(32, 1).index_fill(0, torch.tensor(5), 100)
    find_blocks(llama)[2].forward = lambda hidden_states, **_: hidden_states * factor
    find_blocks(llama)[4].forward = lambda hidden_states, **_: hidden_states / factor
    scores = score_blocks(measure_moments(llama, windows))
    assert [score.block for score in scores if score.moves_sinks] == [2, 4]


@pytest.mark.parametrize("window", [8, 32, 64])
def test_too_few_tokens_are_refused_with_a_number_that_is_enough(llama, window):
    with pytest.raises(ValueError, match=r"give \d+ tokens or more") as refused:
        score_blocks(measure_moments(llama, TokenWindows(make_ids(4, window), "short")))
    enough = int(str(refused.value).split("give ")[1].split()[0])
    assert (
        len(score_blocks(measure_moments(llama, TokenWindows(make_ids(math.ceil(enough / window), window), "longer")))) == 5
    )


# Updates of other sizes


def test_scaled_sums_are_those_of_scaled_rows():
    x = rows(200)
    y = nearly_linear(x)
    gram, scaled = Gram.zeros(1, D, D), Gram.zeros(1, D, D)
    gram.add(0, x, y)
    scaled.add(0, x, x + 0.3 * (y - x))
    for found, expected in zip(vars(gram.scale_update(0.3)).values(), vars(scaled).values(), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_size_of_an_update_moves_the_score_with_residual_alone():
    stream = torch.stack([rows(400, seed=4), nearly_linear(rows(400, seed=4))])
    found = score_scaled(moments_of(stream), [0.01, 0.5, 1, 10, 1000])
    assert found == sorted(found, key=lambda one: -one.held_out), "the smaller the update, the more linear"
    assert found[0].held_out == pytest.approx(1, abs=1e-4)
    assert found[-1].held_out == pytest.approx(found[-1].held_out_without_residual, abs=0.01)
    assert [one.held_out_without_residual for one in found] == pytest.approx([found[0].held_out_without_residual] * 5)
    (scored,) = score_blocks(moments_of(stream))
    assert found[2].held_out == pytest.approx(scored.held_out) and found[2].ordinary == pytest.approx(scored.ordinary)


@pytest.mark.parametrize("factor", [0, -1, float("nan")])
def test_updates_cannot_be_scaled_away(factor):
    stream = torch.stack([rows(400, seed=4), nearly_linear(rows(400, seed=4))])
    with pytest.raises(ValueError, match=f"scaled by {factor}"):
        score_scaled(moments_of(stream), [1, factor])


def test_scores_are_read_as_they_were_written(llama, windows, tmp_path):
    scores = score_blocks(measure_moments(llama, windows), torch.device("cpu"))
    write_scores(tmp_path / "scores.json", scores)
    assert read_scores(tmp_path / "scores.json") == scores
    (tmp_path / "scores.json").write_text('[{"block": 0}]')
    with pytest.raises(ValueError, match="damaged"):
        read_scores(tmp_path / "scores.json")


@pytest.mark.parametrize(("num_windows", "is_enough"), [(1, False), (11, False), (12, True), (24, True)])
def test_too_few_tokens_are_refused_before_they_are_read(llama, windows, num_windows, is_enough):
    """32 dimensions need 128 tokens in the smaller half: 4 windows."""
    few = windows.take(0, num_windows)
    few = TokenWindows(few.ids[:, :24], "short")
    if is_enough:
        require_calibration(few, llama)
        score_blocks(measure_moments(llama, few))
    else:
        with pytest.raises(
            ValueError, match=r"calibration tokens are too few for a hidden size of 32.* give 512 tokens or more"
        ):
            require_calibration(few, llama)
