"""Divergences are divergences, stream losses vanish for equal streams, and gradients flow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoal.distil.losses import cosine_distance, layer_mse, mix_losses, square_head
from shoal.measure.divergence import TopTokens, find_divergence, pick_log_probs
from shoal.recipe import LossWeights
from torch.nn import functional

V = 12


def top_tokens(logits: torch.Tensor, num_top: int, temperature: float = 1.0) -> TopTokens:
    log_probs, ids = (logits / temperature).log_softmax(-1).topk(num_top)
    return TopTokens(ids, log_probs)


def divergence(student: torch.Tensor, teacher: TopTokens, temperature: float = 1.0) -> torch.Tensor:
    return find_divergence(pick_log_probs(student, teacher.ids, temperature), teacher)


def full_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    log_p, log_q = ((logits / temperature).log_softmax(-1) for logits in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


logits = st.lists(st.floats(-20, 20, width=32), min_size=V, max_size=V).map(torch.tensor)
num_tops = st.integers(1, V)
temperatures = st.sampled_from([0.5, 1.0, 4.0])


@given(logits, num_tops, temperatures)
def test_no_divergence_from_itself(teacher, num_top, temperature):
    # Logits of 40, which 20 become at the lowest temperature, are known to 4e-6 in float32.
    assert float(divergence(teacher, top_tokens(teacher, num_top, temperature), temperature)) == pytest.approx(0, abs=1e-5)


@given(logits, logits, num_tops, temperatures)
def test_divergence_is_between_nothing_and_that_over_all_tokens(student, teacher, num_top, temperature):
    found = float(divergence(student, top_tokens(teacher, num_top, temperature), temperature))
    full = float(full_divergence(student, teacher, temperature))
    # What the other tokens hold is known to 4 % where it is as little as MIN_REST.
    assert -1e-4 <= found <= full * (1 + 1e-5) + 0.05


@given(logits, logits, temperatures)
def test_divergence_over_all_tokens_is_exact(student, teacher, temperature):
    found = float(divergence(student, top_tokens(teacher, V, temperature), temperature))
    assert found == pytest.approx(float(full_divergence(student, teacher, temperature)), rel=1e-4, abs=2e-5)


def test_divergence_is_in_nats():
    teacher, student = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    assert float(divergence(student, top_tokens(teacher, 3))) == pytest.approx(0.25 * torch.log(torch.tensor(2.0)).item())


def test_the_gradient_is_the_difference_of_the_distributions():
    student, teacher = torch.randn(2, V, generator=torch.Generator().manual_seed(0)).unbind()
    student.requires_grad_(True)
    divergence(student, top_tokens(teacher, V)).backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1), rtol=1e-4, atol=1e-5)


def test_tokens_outside_the_top_feel_a_gradient():
    """The bucket is what pulls probability out of the tail."""
    student = torch.zeros(V, requires_grad=True)
    divergence(student, top_tokens(torch.arange(V).float() * 3, 2)).backward()
    assert bool((student.grad[:10] > 0).all())
    assert bool(torch.isfinite(student.grad).all())


def streams(seed: int) -> list[torch.Tensor]:
    return list(torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("loss", [layer_mse, square_head, cosine_distance])
def test_stream_losses_of_equal_streams_vanish(loss):
    assert float(loss(streams(0), streams(0))) == pytest.approx(0, abs=1e-6)
    assert float(loss(streams(0), streams(1))) > 0.1


def test_values_of_stream_losses():
    ones, threes = [torch.ones(1, 3, 4)] * 2, [torch.full((1, 3, 4), 3.0)] * 2
    assert float(layer_mse(ones, threes)) == pytest.approx(8)  # a sum over layers
    assert float(square_head(ones, threes)) == pytest.approx(4 / 9)  # a mean over layers
    assert float(cosine_distance(ones, threes)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_distance(ones, [-t for t in threes])) == pytest.approx(2)


@given(st.floats(0.1, 100))
def test_square_head_does_not_depend_on_scale(scale):
    """Every layer counts alike, however large its stream."""
    scaled = float(square_head([s * scale for s in streams(0)], [t * scale for t in streams(1)]))
    assert scaled == pytest.approx(float(square_head(streams(0), streams(1))), rel=1e-3)


@pytest.mark.parametrize("loss", [layer_mse, square_head])
@given(scale=st.floats(10, 1e4), miss=st.floats(-1, 1), sinks=st.sets(st.integers(1, 15), max_size=3))
def test_sinks_rule_no_loss_of_streams(loss, scale, miss, sinks):
    """Whatever the first token and massive activations are, and however badly met: value and gradient are the others'."""
    generator, ordinary = torch.Generator().manual_seed(0), [i for i in range(16) if i not in sinks | {0}]
    s, t = torch.randn(2, 1, 16, 8, generator=generator).unbind()
    t[:, [0, *sinks]] = scale * t.norm(dim=-1, keepdim=True).amax() * torch.ones(8) / 8**0.5
    s[:, [0, *sinks]] = (1 + miss) * t[:, [0, *sinks]]
    s.requires_grad_()
    found = loss([s], [t])
    error = (s - t)[:, ordinary].square().mean()
    expected = error if loss is layer_mse else error / (t[:, ordinary].square().mean() + 1e-6)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, s)[0] for value in (found, expected)))


@pytest.mark.parametrize("loss", [layer_mse, square_head, cosine_distance])
def test_a_batch_is_the_mean_of_its_windows_whatever_sinks_they_have(loss):
    """So passes and ranks, which share windows out, find together what one finds alone."""
    s, t = streams(0), streams(1)
    for stream in t:
        stream[0, 2:4] *= 1000
    parts = [float(loss([each[i : i + 1] for each in s], [each[i : i + 1] for each in t])) for i in range(2)]
    assert float(loss(s, t)) == pytest.approx(sum(parts) / 2)


@given(st.integers(0, 99), st.integers(0, 99))
def test_cosine_distance_is_bounded(seed, other):
    assert -1e-6 <= float(cosine_distance(streams(seed), streams(other))) <= 2 + 1e-6


@pytest.mark.parametrize("loss", [layer_mse, square_head, cosine_distance])
def test_streams_of_other_length_are_refused(loss):
    with pytest.raises(ValueError, match="zip"):
        loss(streams(0), streams(1)[:2])


def test_the_mix_is_the_weighted_sum():
    weights, kl = LossWeights(logit_kl=2, layer_mse=3, square_head=5, cosine=7), torch.tensor(0.5)
    s, t = streams(0), streams(1)
    expected = 2 * kl + 3 * layer_mse(s, t) + 5 * square_head(s, t) + 7 * cosine_distance(s, t)
    torch.testing.assert_close(mix_losses(weights, divergence=kl, student=s, teacher=t), expected)
    only = LossWeights(logit_kl=0, cosine=1)
    torch.testing.assert_close(mix_losses(only, divergence=None, student=s, teacher=t), cosine_distance(s, t))


@pytest.mark.parametrize("loss", [layer_mse, square_head, cosine_distance])
def test_gradients_reach_every_layer(loss):
    student = [stream.requires_grad_(True) for stream in streams(0)]
    loss(student, streams(1)).backward()
    assert all(float(stream.grad.abs().sum()) > 0 for stream in student)


def test_bfloat16_logits_are_compared_in_float32():
    teacher = torch.randn(V, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = pick_log_probs(teacher, torch.arange(V))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, functional.log_softmax(teacher.float(), -1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_rows", [1, 64, 131])
def test_picked_log_probs_and_their_gradient_are_those_of_log_softmax(temperature, num_rows):
    """The strips are an implementation: value and gradient are autograd's of the plain formula."""
    generator = torch.Generator().manual_seed(num_rows)
    logits = (5 * torch.randn(num_rows, 2, V, generator=generator)).requires_grad_()
    ids = torch.stack([torch.randperm(V, generator=generator)[:4] for _ in range(num_rows * 2)]).view(num_rows, 2, 4)
    weight = torch.randn(num_rows, 2, 4, generator=generator)
    picked = pick_log_probs(logits, ids, temperature)
    (gradient,) = torch.autograd.grad((picked * weight).sum(), logits)
    plain = (logits / temperature).log_softmax(-1).gather(-1, ids)
    (expected,) = torch.autograd.grad((plain * weight).sum(), logits)
    torch.testing.assert_close(picked, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
