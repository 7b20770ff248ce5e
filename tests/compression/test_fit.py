"""Closed forms are what plain least squares says: affine blocks recovered, limits of ridge and rank, runs composed."""

from __future__ import annotations

import pytest
import torch
from conftest import moments_of
from shoal.linearity.gram import Gram
from shoal.replace.fit import RIDGES, fit_affine, fit_independent, fit_projection

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


WEIGHT = rows(D, seed=4, width=20)


def refit(z: torch.Tensor, y: torch.Tensor, *, bias: torch.Tensor | None = None, sinks=None, ridge: float | None = None):
    """`WEIGHT` fitted on every other row, with sinks (z, y), λ judged on the others."""
    gram, held = gram_of(z[::2], y[::2]), gram_of(z[1::2], y[1::2])
    return fit_projection(gram if sinks is None else gram + gram_of(*sinks), WEIGHT, bias, held_out=held, ridge=ridge)


def make_sinks(scale: float, num: int = 2, *, seed: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs `scale` times an ordinary token's, and updates as much larger that no other token asks for."""
    return scale * rows(num, seed=seed, width=20), scale * rows(num, seed=seed + 1)


def residual_share(z: torch.Tensor, y: torch.Tensor, fitted) -> float:
    """Of what is missing, what still is."""
    weight, bias = fitted
    return float((z @ (weight - WEIGHT).T + (0 if bias is None else bias) - y).square().sum() / y.square().sum())


def test_down_proj_stays_under_a_huge_ridge():
    torch.testing.assert_close(refit(rows(100, width=20), rows(100, seed=1), ridge=1e12)[0], WEIGHT)


@pytest.mark.parametrize("bias", [None, rows(1, seed=9)[0]])
def test_down_proj_without_ridge_is_least_squares(bias):
    """Through the origin where there is no bias, and with a new bias where there is one."""
    z, y = rows(100, width=20) + 1, rows(100, seed=1) + 2
    weight, fitted_bias = refit(z, y, bias=bias, ridge=1e-13)
    aim = z @ WEIGHT.T + y + (0 if bias is None else bias)
    full = z if bias is None else torch.cat([z, torch.ones(100, 1)], 1)
    solution = torch.linalg.lstsq(full, aim).solution
    torch.testing.assert_close(weight, solution[:20].T, rtol=1e-6, atol=1e-8)
    if bias is None:
        assert fitted_bias is None
    else:
        torch.testing.assert_close(fitted_bias, solution[20], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [30, 300, 10_000])
@pytest.mark.parametrize("bias", [None, torch.zeros(D, dtype=torch.float64)])
def test_down_proj_learns_what_there_is_to_learn_beside_sinks(scale, bias):
    """An update that some projection makes exactly of all tokens is found, and with more tokens through more noise."""
    wanted, (sinks, _) = rows(D, seed=11, width=20) / 4, make_sinks(scale)
    shift = 0 if bias is None else 0.5
    for noise, shares in ((0, (1e-6, 1e-6)), (2, (0.5, 0.02))):
        for num_rows, share in zip((200, 4_000), shares, strict=True):
            z = rows(num_rows, width=20)
            exact = z @ wanted.T + shift
            fitted = refit(z, exact + noise * rows(num_rows, seed=12), bias=bias, sinks=(sinks, sinks @ wanted.T + shift))
            assert residual_share(z, exact, fitted) < share


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_down_proj_does_not_depend_on_scale(scale):
    """As large inputs, updates and weights as one likes: the same choice of λ, and the same fit but for scale."""
    z, y, sinks = rows(60, width=20), rows(60, seed=1), make_sinks(100)
    plain = refit(z, y, sinks=sinks)[0] - WEIGHT
    for in_scale, out_scale in ((scale, scale), (scale, 1), (1, scale)):
        scaled = refit(z * in_scale, y * out_scale, sinks=(sinks[0] * in_scale, sinks[1] * out_scale))[0] - WEIGHT
        torch.testing.assert_close(scaled * in_scale / out_scale, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [30, 10_000])
def test_one_more_sink_changes_no_ordinary_token(scale):
    """A sink in a direction of its own, whatever it asks for."""
    z = torch.cat([rows(60, width=19), torch.zeros(60, 1)], 1)
    y, sink = rows(60, seed=1), torch.zeros(1, 20, dtype=torch.float64)
    sink[0, -1] = scale
    without, with_it = refit(z, y), refit(z, y, sinks=(sink, scale * rows(1, seed=8)))
    # One token more of 61 is that much more penalty.
    torch.testing.assert_close(z @ with_it[0].T, z @ without[0].T, rtol=0, atol=0.02)
    torch.testing.assert_close(with_it[0][:, -1] - WEIGHT[:, -1], rows(1, seed=8)[0], rtol=0.2, atol=0.05)


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
