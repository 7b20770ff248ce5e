"""Fits in order: the model stays, affine blocks are recovered, and order pays."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_affine, make_ids, make_model
from shoal.checkpoints.hashes import hash_weights
from shoal.linearity.accumulate import measure_moments
from shoal.models.projections import find_down_proj
from shoal.models.shorten import drop_blocks
from shoal.models.structure import find_blocks, watch_boundaries
from shoal.recipe import KINDS
from shoal.replace.fit import fit_independent
from shoal.replace.in_order import fit_in_order
from shoal.replace.maps import Replacement, apply_replacement
from shoal.text.windows import TokenWindows


def replace(model, replacement: Replacement):
    student = copy.deepcopy(model)
    apply_replacement(student, replacement)
    return student


@torch.no_grad()
def last_boundary(model, ids: torch.Tensor) -> torch.Tensor:
    found = []
    with watch_boundaries(model, lambda _boundary, stream: found.append(stream)):
        model(input_ids=ids)
    return found[-1]


def stream_error(model, replacement: Replacement, windows: TokenWindows) -> float:
    """Squared error of the last boundary, relative to the dense model's."""
    aim = last_boundary(model, windows.ids)
    return float((last_boundary(replace(model, replacement), windows.ids) - aim).square().sum() / aim.square().sum())


def logits_change(model, replacement: Replacement) -> float:
    """The largest change of a logit, relative to the largest logit, on tokens that nothing was fitted on."""
    ids = make_ids(4, 32, seed=7)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        return float((replace(model, replacement)(input_ids=ids).logits - logits).abs().max() / logits.abs().max())


def make_identity(model, block: int) -> None:
    """A block that adds nothing to the stream."""
    with torch.no_grad():
        for name, parameter in find_blocks(model)[block].named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.zero_()


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_stays_as_it_is(llama, windows, kind):
    before, hooks = hash_weights(llama), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules())
    fit_in_order(llama, (1, 3), windows.take(0, 16), kind=kind, rank=4 if kind == "low_rank" else None)
    assert hash_weights(llama) == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules()) == hooks
    assert len(find_blocks(llama)) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("refit", [True, False])
def test_a_block_that_does_nothing_is_replaced_without_a_trace(llama, windows, kind, refit):
    make_identity(llama, 2)
    rank = 4 if kind == "low_rank" else None
    replacement = fit_in_order(llama, (2,), windows, kind=kind, rank=rank, refit_outputs=refit)
    assert logits_change(llama, replacement) < 1e-4


@pytest.mark.parametrize("blocks", [(0,), (2,), (1, 2), (1, 3), (4,)])
def test_affine_blocks_are_recovered(llama, windows, blocks):
    for block in blocks:
        make_affine(llama, block, seed=block)
    assert logits_change(llama, Replacement(blocks)) > 0.05
    assert logits_change(llama, fit_in_order(llama, blocks, windows)) < 1e-3


def test_an_affine_block_is_folded_into_the_one_before():
    """Nearly exactly, where `down_proj` of that block makes nearly all of the stream."""
    llama, windows = make_model("llama"), TokenWindows(make_ids(64, 32), "random")
    with torch.no_grad():
        find_blocks(llama)[1].self_attn.o_proj.weight.zero_()
        find_blocks(llama)[1].mlp.down_proj.weight.mul_(30)  # so that nearly all of the stream comes from it
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    find_blocks(llama)[2].forward = lambda hidden_states, **_: hidden_states @ turn
    folded, dropped = (fit_in_order(llama, (2,), windows, kind=kind, refit_outputs=False) for kind in ("folded", "dropped"))
    assert stream_error(llama, folded, windows) < 0.05 * stream_error(llama, dropped, windows)
    assert [(block, *weights) for block, weights in folded.weights.items()] == [(1, "mlp.down_proj.weight")]
    assert not folded.maps


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "gptj"])
def test_a_block_that_adds_a_constant_is_folded_into_the_bias_before_it(family, windows):
    model = make_model(family)
    make_identity(model, 2)
    with torch.no_grad():
        find_down_proj(find_blocks(model)[2], 32).bias.copy_(torch.linspace(-1, 1, 32))
    folded = fit_in_order(model, (2,), windows, kind="folded", refit_outputs=False)
    assert logits_change(model, folded) < 1e-3 < 0.05 < logits_change(model, Replacement((2,)))
    assert sorted(name.rpartition(".")[2] for name in folded.weights[1]) == ["bias", "weight"]


def test_a_projection_without_bias_gets_none(llama, windows):
    replacement = fit_in_order(llama, (2,), windows.take(0, 16), kind="folded")
    assert all(name.endswith(".weight") for weights in replacement.weights.values() for name in weights)


@pytest.mark.parametrize("blocks", [(2,), (1, 2), (0, 3)])
def test_dropped_without_refit_is_only_dropped(llama, windows, blocks):
    replacement, ids = fit_in_order(llama, blocks, windows, kind="dropped", refit_outputs=False), make_ids(2, 16)
    assert not replacement.maps
    assert not replacement.weights
    expected = copy.deepcopy(llama)
    drop_blocks(expected, blocks)
    with torch.no_grad():
        assert torch.equal(replace(llama, replacement)(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize("blocks", [(1, 3), (0, 2, 3), (1, 2, 3)])
def test_fits_in_order_beat_independent_ones(llama, windows, blocks):
    """Each step below does what the one before it cannot; on the tokens that were fitted."""
    independent = fit_independent(measure_moments(llama, windows), blocks, ridge=1e-6)
    in_order = fit_in_order(llama, blocks, windows, ridge=1e-6, refit_outputs=False)
    refitted = fit_in_order(llama, blocks, windows, ridge=1e-6)
    dropped = fit_in_order(llama, blocks, windows, kind="dropped", refit_outputs=False)
    errors = [stream_error(llama, r, windows) for r in (refitted, in_order, independent, dropped)]
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[1]


def test_down_proj_is_fitted_after_the_first_replaced_block_only(llama, windows):
    replacement = fit_in_order(llama, (2,), windows.take(0, 16))
    assert sorted(replacement.weights) == [3, 4]
    assert sorted(replacement.weights[3]) == ["mlp.down_proj.weight", "self_attn.o_proj.weight"]
    for name, weight in replacement.weights[3].items():
        assert weight.shape == find_blocks(llama)[3].get_parameter(name).shape


def test_nothing_replaced_is_nothing_fitted(llama, windows):
    assert fit_in_order(llama, (), windows.take(0, 8)) == Replacement(())


def test_the_student_stream_is_what_the_replaced_model_computes(llama, windows):
    """The walk's last fit makes up for exactly the error that the finished student has: nothing is left to fit."""
    replacement = fit_in_order(llama, (1, 3), windows, refit_outputs=False, ridge=0.0)
    student, aim, found = replace(llama, replacement), {}, {}
    with torch.no_grad():
        with watch_boundaries(llama, aim.__setitem__):
            llama(input_ids=windows.ids)
        with watch_boundaries(student, found.__setitem__):
            student(input_ids=windows.ids)
    # After the map that replaces block 3 (student boundary 2), the residual has no mean: least squares left none.
    residual = (found[2] - aim[4]).flatten(0, 1)
    assert float(residual.mean(0).abs().max()) < 1e-4


@pytest.mark.parametrize("num_windows", [2, 3, 7, 12])
def test_any_number_of_windows_is_walked(llama, windows, num_windows):
    assert sorted(fit_in_order(llama, (1, 3), windows.take(0, num_windows)).maps) == [1, 3]


def test_a_single_window_is_refused(llama, windows):
    with pytest.raises(ValueError, match="every other batch is held out: give two or more"):
        fit_in_order(llama, (1,), windows.take(0, 1))


def test_progress_ends_at_the_last_block(llama, windows):
    heard: list[int] = []
    fit_in_order(llama, (1, 2), windows.take(0, 8), on_progress=heard.append)
    assert heard == [1, 3, 4, 5]


@pytest.mark.parametrize(
    ("family", "blocks", "message"),
    [("llama", (0, 2), "block 0 has no block before it"), ("gemma2", (2,), "no single down projection")],
)
def test_what_cannot_be_folded_is_refused(family, blocks, message):
    with pytest.raises(ValueError, match=message):
        fit_in_order(make_model(family), blocks, TokenWindows(make_ids(4, 16), "random"), kind="folded")
