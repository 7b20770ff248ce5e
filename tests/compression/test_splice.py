"""What a block is worth is what the model with that one change loses, and a map is free where the block is affine."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_affine, make_ids
from shoal.linearity.accumulate import measure_moments
from shoal.measure.perplexity import score_windows
from shoal.measure.targets import measure_targets
from shoal.models.shorten import drop_blocks
from shoal.paper.splice import measure_splices
from shoal.replace.maps import Replacement, make_replaced
from shoal.text.windows import TokenWindows

CALIBRATION, HELD = (TokenWindows(make_ids(num, 32, seed=num), "ids") for num in (16, 4))


def measure(model):
    moments = measure_moments(model, CALIBRATION)
    return measure_splices(model, moments, HELD, measure_targets(model, HELD, num_top=1))


def test_an_affine_block_is_worth_nothing_to_its_map(llama):
    make_affine(llama, 2)
    found = measure(llama)
    assert [one.block for one in found] == list(range(len(found)))
    assert found[2].mapped == pytest.approx(0, abs=1e-4)
    assert abs(found[2].removed) > 10 * abs(found[2].mapped)


def test_removal_costs_what_the_shallower_model_loses(model):
    before = copy.deepcopy(model.state_dict())
    found = measure(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the model is as it was"
    targets = measure_targets(model, HELD, num_top=1)
    drop_blocks(model, [1])
    loss = score_windows(model, HELD, targets).nll - targets.nll.double().mean(1)
    assert found[1].removed == pytest.approx(float(loss.mean()), abs=1e-6)
    assert found[1].removed_standard_error == pytest.approx(float(loss.std()) / len(loss) ** 0.5, abs=1e-6)


def test_a_copy_that_shares_weights_takes_no_new_ones(llama):
    with pytest.raises(ValueError, match="new weights"):
        make_replaced(llama, Replacement((1,), weights={0: {"mlp.down_proj.weight": torch.zeros(1)}}))
