"""The regularisers are what their formulas say, their gradients too, and λ = 0 is no regulariser at all."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_ids, make_model
from shoal.paper.pretrain_recipe import Regularizer
from shoal.paper.regularize import Penalty, cosine_regularizer, mse_regularizer


def random_streams(num_boundaries: int = 4, *, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(num_boundaries)]


@pytest.mark.parametrize("regularizer", [cosine_regularizer, mse_regularizer])
def test_gradients_match_finite_differences(regularizer):
    streams = [stream.requires_grad_() for stream in random_streams()]
    assert torch.autograd.gradcheck(lambda *given: regularizer(given), streams)


@pytest.mark.parametrize("regularizer", [cosine_regularizer, mse_regularizer])
def test_a_stream_that_no_block_changes_costs_nothing(regularizer):
    assert float(regularizer([random_streams(1)[0]] * 4)) == pytest.approx(0, abs=1e-12)


def test_known_angles_and_distances():
    """Turned by a right angle, then turned round and doubled: 1 − 0, then 1 − (−1); squared distances 2, then 9."""
    first, second, third = (torch.tensor([[[*pair, 0.0]]]) for pair in ((1, 0), (0, 1), (0, -2)))
    assert float(cosine_regularizer([first, second, third])) == pytest.approx(1 + 2)
    assert float(mse_regularizer([first, second, third])) == pytest.approx((2 + 9) / 3)


def test_the_cosine_does_not_see_lengths_and_the_mse_does():
    streams = random_streams()
    longer = [stream * (index + 1) for index, stream in enumerate(streams)]
    assert float(cosine_regularizer(longer)) == pytest.approx(float(cosine_regularizer(streams)))
    assert float(mse_regularizer(longer)) > float(mse_regularizer(streams))


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_the_penalty_of_a_model_reaches_every_block(kind):
    model, ids = make_model("mistral"), make_ids(2, 16)
    penalty = Penalty(Regularizer.of(kind, 0.5))
    with penalty.watch(model):
        model(input_ids=ids, use_cache=False)
    twice = Penalty(Regularizer.of(kind, 1.0))
    with twice.watch(model):
        model(input_ids=ids, use_cache=False)
    found = penalty.take()
    assert twice.take().item() == pytest.approx(2 * found.item())
    found.backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.model.layers.parameters())
    assert model.lm_head.weight.grad is None and model.model.norm.weight.grad is None, "before the final norm"


def test_at_weight_0_nothing_is_watched():
    model = make_model("mistral")
    penalty = Penalty(Regularizer())
    with penalty.watch(model):
        assert not any(block._forward_hooks for block in model.model.layers)
        model(input_ids=make_ids(1, 8))
    assert penalty.take() == 0.0


def test_all_kinds_are_none_at_weight_0():
    assert Regularizer.of("cosine", 0.0) == Regularizer.of("mse", 0.0) == Regularizer()
    assert [Regularizer.of("cosine", 0.5).label, Regularizer().label] == ["cosine 0.5", "none"]


@pytest.mark.parametrize("weight", [-0.5, -1e-9])
def test_a_negative_weight_is_refused(weight):
    with pytest.raises(ValueError, match=rf"λ is {weight:g}; a regulariser's weight must be 0 \(none\) or more"):
        Regularizer(kind="cosine", weight=weight)


@pytest.mark.parametrize(("kind", "weight"), [("none", 0.5), ("cosine", 0.0), ("mse", math.inf), ("l2", 1)])
def test_what_means_nothing_is_refused(kind, weight):
    with pytest.raises(ValueError, match=r"λ = 0 is kind='none'|finite number|'none', 'cosine' or 'mse'"):
        Regularizer(kind=kind, weight=weight)
