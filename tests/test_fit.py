"""Closed forms are what plain least squares says: affine blocks recovered, limits of ridge and rank, runs composed."""

from __future__ import annotations

import pytest
import torch
from conftest import moments_of
from shoal.fit import RIDGES, fit_affine, fit_down_proj, fit_independent
from shoal.gram import Gram

D = 12


def rows(num_rows: int, *, seed: int = 0, width: int = D) -> torch.Tensor:
    return torch.randn(num_rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram_of(x: torch.Tensor, y: torch.Tensor) -> Gram:
    gram = Gram.zeros(1, x.shape[1], y.shape[1])
    gram.add(0, x, y)
    return gram


NO_SINKS = Gram.zeros(1, D, D)
X = rows(400) @ rows(D, seed=5) / 4 + 2
AFFINE = X + X @ rows(D, seed=1) / 4 + rows(1, seed=2)
NOISY = AFFINE + torch.tanh(rows(400, seed=3))


def error(affine, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((affine(x.float()).double() - y).square().sum())


@pytest.mark.parametrize("rank", [None, D])
def test_an_exactly_affine_block_is_recovered(rank):
    affine = fit_affine(gram_of(X[::2], AFFINE[::2]), NO_SINKS, held_out=gram_of(X[1::2], AFFINE[1::2]), rank=rank)
    assert error(affine, X, AFFINE) < 1e-4**2 * float(AFFINE.square().sum())


def test_a_huge_ridge_leaves_the_identity_and_the_mean_step():
    affine = fit_affine(gram_of(X, NOISY), NO_SINKS, ridge=1e12)
    assert float(affine.matrix.abs().max()) < 1e-9
    torch.testing.assert_close(affine.bias.double(), (NOISY - X).mean(0), rtol=1e-5, atol=1e-5)


def test_without_ridge_it_is_least_squares():
    affine = fit_affine(gram_of(X, NOISY), NO_SINKS, ridge=0.0)
    solution = torch.linalg.lstsq(torch.cat([X, torch.ones(len(X), 1)], 1), NOISY - X).solution
    torch.testing.assert_close(affine.matrix.double(), solution[:-1].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(affine.bias.double(), solution[-1], rtol=1e-4, atol=1e-5)


def test_directions_without_variance_do_no_harm():
    """Fewer tokens than dimensions, and no ridge."""
    affine = fit_affine(gram_of(X[:5], NOISY[:5]), NO_SINKS, ridge=0.0)
    assert error(affine, X[:5], NOISY[:5]) < 1e-6


def test_the_penalty_does_not_depend_on_scale():
    affine = fit_affine(gram_of(X, NOISY), NO_SINKS, ridge=0.1)
    scaled = fit_affine(gram_of(X * 1000, NOISY * 1000), NO_SINKS, ridge=0.1)
    torch.testing.assert_close(scaled.matrix, affine.matrix, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scaled.bias, affine.bias * 1000, rtol=1e-4, atol=1e-3)


def test_sinks_are_fitted_and_do_not_set_the_penalty():
    """A sink in a direction of its own is mapped as well as the rest, and ordinary directions are shrunk no more."""
    x, y = (torch.cat([t, torch.zeros(len(t), 1)], 1) for t in (X, NOISY))
    sink = torch.zeros(4, D + 1, dtype=torch.float64).index_fill(1, torch.tensor(D), 1e4)
    affine = fit_affine(gram_of(x, y), gram_of(sink, sink * 3), ridge=0.01)
    alone = fit_affine(gram_of(X, NOISY), NO_SINKS, ridge=0.01)
    torch.testing.assert_close(affine(sink.float()), (sink * 3).float(), rtol=1e-2, atol=30)
    assert error(affine, x, y) < 1.2 * error(alone, X, NOISY)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_low_rank_is_the_best_of_its_rank(rank):
    """The update's fitted values are the truncated singular value decomposition of the full fit's (Eckart-Young)."""
    gram = gram_of(X, NOISY)
    full, low = (fit_affine(gram, NO_SINKS, ridge=0.0, rank=r) for r in (None, rank))
    centred = X - X.mean(0)
    u, s, vh = torch.linalg.svd(centred @ full.matrix.T.double(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    torch.testing.assert_close(centred @ low.matrix.T.double(), best, rtol=1e-3, atol=1e-3)
    assert torch.linalg.matrix_rank(low.matrix) == rank == low.rank
    torch.testing.assert_close(low(X.float()).mean(0).double(), NOISY.mean(0), rtol=1e-4, atol=1e-4)


def test_full_rank_is_the_full_map():
    gram = gram_of(X, NOISY)
    full, low = (fit_affine(gram, NO_SINKS, ridge=0.01, rank=rank) for rank in (None, D))
    torch.testing.assert_close(low.matrix, full.matrix, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low.bias, full.bias, rtol=1e-4, atol=1e-4)


def test_a_rank_above_the_hidden_size_is_refused():
    with pytest.raises(ValueError, match=f"rank={D + 1} is more than the hidden size {D}"):
        fit_affine(gram_of(X, NOISY), NO_SINKS, ridge=0.1, rank=D + 1)


@pytest.mark.parametrize(("num_rows", "noise"), [(16, 3.0), (40, 1.0), (400, 0.1)])
def test_the_chosen_ridge_has_the_least_held_out_error(num_rows, noise):
    x, held_x = rows(num_rows), rows(500, seed=8)
    y, held_y = (t + t @ rows(D, seed=1) / 8 + noise * rows(len(t), seed=9) for t in (x, held_x))
    fitted, held = gram_of(x, y), gram_of(held_x, held_y)
    best = min(RIDGES, key=lambda ridge: error(fit_affine(fitted, NO_SINKS, ridge=ridge), held_x, held_y))
    chosen = fit_affine(fitted, NO_SINKS, held_out=held)
    named = fit_affine(fitted + held, NO_SINKS, ridge=best)
    assert torch.equal(chosen.matrix, named.matrix)


def test_a_named_ridge_fits_all_tokens_too():
    halves = gram_of(X[::2], NOISY[::2]), gram_of(X[1::2], NOISY[1::2])
    named = fit_affine(halves[0], NO_SINKS, held_out=halves[1], ridge=0.01)
    torch.testing.assert_close(named.matrix, fit_affine(gram_of(X, NOISY), NO_SINKS, ridge=0.01).matrix)


def test_down_proj_stays_under_a_huge_ridge():
    weight = rows(D, seed=4, width=20).float()
    gram = gram_of(rows(100, width=20), rows(100, seed=1))
    torch.testing.assert_close(fit_down_proj(gram, weight, ridge=1e12).float(), weight)


def test_down_proj_without_ridge_is_least_squares():
    weight, z, target = rows(D, seed=4, width=20), rows(100, width=20), rows(100, seed=1)
    fitted = fit_down_proj(gram_of(z, target - z @ weight.T), weight, ridge=1e-12)
    torch.testing.assert_close(fitted, torch.linalg.lstsq(z, target).solution.T, rtol=1e-6, atol=1e-8)


def stream() -> torch.Tensor:
    streams = [rows(400)]
    for block in range(4):
        x = streams[-1]
        streams.append(x + x @ rows(D, seed=10 + block) / 8 + torch.tanh(x) / 2 + 0.3)
    return torch.stack(streams)


def test_the_map_of_a_run_is_its_blocks_maps_one_after_the_other():
    moments = moments_of(stream())
    together = fit_independent(moments, (1, 2), ridge=0.01)
    first, second = (fit_independent(moments, (block,), ridge=0.01).maps[block] for block in (1, 2))
    assert list(together.maps) == [1]
    torch.testing.assert_close(together.maps[1](X.float()), second(first(X.float())), rtol=1e-4, atol=1e-4)


def test_maps_of_runs_apart_are_apart():
    replacement = fit_independent(moments_of(stream()), (3, 0, 1))
    assert replacement.blocks == (0, 1, 3)
    assert sorted(replacement.maps) == [0, 3]


def test_a_run_of_full_rank_is_the_full_map_and_of_less_the_nearest():
    moments, x = moments_of(stream()), stream()[1]
    full, same, low = (fit_independent(moments, (1, 2), ridge=0.01, rank=rank).maps[1] for rank in (None, D, 3))
    torch.testing.assert_close(same.matrix, full.matrix, rtol=1e-3, atol=1e-4)
    centred = x - x.mean(0)
    singular = torch.linalg.svdvals(centred @ full.matrix.T.double())
    left_out = (centred @ (full.matrix - low.matrix).T.double()).square().sum()
    torch.testing.assert_close(left_out, singular[3:].square().sum(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(low(x.float()).mean(0), full(x.float()).mean(0), rtol=1e-4, atol=1e-4)
