"""Perplexity is plain cross entropy, the dense model beside itself is no different, sizes are arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_ids, make_model
from shoal.errors import Collapsed
from shoal.measure.divergence import find_normalizer
from shoal.measure.perplexity import evaluate, mean_and_error, score_windows
from shoal.measure.size_and_speed import measure_size, measure_speeds
from shoal.measure.targets import TeacherTargets, measure_targets
from shoal.models.shorten import drop_blocks
from shoal.text.windows import TokenWindows
from torch.nn import functional


@pytest.fixture
def student():
    return make_model("llama", seed=1)


def window_losses(model, windows: TokenWindows) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=windows.ids).logits.double()
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows.ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(windows), -1).mean(1)


def test_perplexity_is_that_of_plain_cross_entropy(llama, student, windows):
    result = evaluate(student, windows, measure_targets(llama, windows))
    for model, perplexity, error in (
        (student, result.perplexity, result.standard_error),
        (llama, result.dense_perplexity, result.dense_standard_error),
    ):
        losses = window_losses(model, windows)
        assert perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
        assert error == pytest.approx(perplexity * float(losses.std()) / 8, rel=1e-4)
    difference = window_losses(student, windows) - window_losses(llama, windows)
    assert result.log_ratio == pytest.approx(float(difference.mean()), rel=1e-4)
    assert result.log_ratio_standard_error == pytest.approx(float(difference.std()) / 8, rel=1e-4)
    assert result.log_ratio == pytest.approx(math.log(result.perplexity / result.dense_perplexity), rel=1e-6)
    assert result.text.model_dump() == {"name": "random", "sha256": windows.sha256, "num_tokens": 2048}


def test_divergence_and_agreement_are_those_of_the_distributions(llama, student, windows):
    result = evaluate(student, windows, measure_targets(llama, windows, num_top=128))
    with torch.no_grad():
        log_p, log_q = (model(input_ids=windows.ids).logits[:, :-1].log_softmax(-1) for model in (llama, student))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert result.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert result.kl_standard_error == pytest.approx(float(kl.mean(1).std()) / 8, rel=1e-2)
    assert result.top1_agreement == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean()))


def test_the_dense_model_beside_itself(model):
    windows = TokenWindows(make_ids(8, 32), "random")
    result = evaluate(model, windows, measure_targets(model, windows))
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.log_ratio == 0
    assert result.log_ratio_standard_error == 0
    assert result.top1_agreement == 1


def test_mean_and_error():
    assert mean_and_error(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx((2.5, math.sqrt(5 / 3) / 2))


def test_one_window_has_no_standard_error(llama, windows):
    one = windows.take(0, 1)
    with pytest.raises(ValueError, match="fills 1 window; a standard error needs 2 or more"):
        evaluate(llama, one, measure_targets(llama, one))


def test_targets_of_other_windows_are_refused(llama, windows):
    with pytest.raises(ValueError, match="not of text 'random': delete them and measure again"):
        evaluate(llama, windows.take(0, 8), measure_targets(llama, windows.take(8, 16)))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_broken_model_is_called_so(llama, student, windows, value):
    dense = measure_targets(llama, windows)
    with torch.no_grad():
        student.model.norm.weight.fill_(value)
    with pytest.raises(Collapsed, match="loss on 'random' is"):
        evaluate(student, windows, dense)


def test_progress_reaches_the_number_of_windows(llama, windows):
    heard: list[int] = []
    score_windows(llama, windows, measure_targets(llama, windows, on_progress=heard.append), on_progress=heard.append)
    assert heard == list(range(8, 65, 8)) * 2


def test_targets_survive_their_file(llama, windows, tmp_path):
    file = tmp_path / "targets.safetensors"
    targets = measure_targets(llama, windows.take(0, 8), temperatures=(1.0, 2.0))
    targets.save(file)
    loaded = TeacherTargets.load(file)
    assert loaded.text_sha256 == targets.text_sha256
    assert sorted(loaded.log_normalizers) == [1.0, 2.0]
    for temperature in (1.0, 2.0):
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                *(t.top_tokens(slice(2, 5), torch.device("cpu"), temperature) for t in (loaded, targets)), strict=True
            )
        )
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"damaged .*delete the file and measure again"):
        TeacherTargets.load(file)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_normalizers_are_the_logarithm_of_the_sum(temperature):
    logits = torch.randn(3, 70, 128, generator=torch.Generator().manual_seed(0)) * 30
    normalizer, top = find_normalizer(logits.clone(), temperature)
    torch.testing.assert_close(normalizer, (logits / temperature).logsumexp(-1))
    assert torch.equal(top, logits.argmax(-1))


def test_normalizers_leave_the_logits_alone():
    logits = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    find_normalizer(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2"])
def test_sizes_are_arithmetic(family):
    model = make_model(family)
    heads, width = (4, 8) if family == "gpt2" else (2, 8)
    for depth in (5, 3):
        size = measure_size(model)
        assert size.kv_bytes_per_token == depth * 2 * heads * width * 4
        drop_blocks(model, [1, 2] if depth == 5 else [])
    assert size.num_bytes == 4 * size.num_parameters
    assert measure_size(model.bfloat16()).num_bytes == 2 * size.num_parameters


def test_tied_weights_count_once(llama):
    """Embeddings, five blocks of two norms, four attention and three MLP matrices, and the last norm."""
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    block = 2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert measure_size(llama).num_parameters == 128 * 32 + 5 * block + 32


def test_speeds_are_positive(llama):
    (speed,) = measure_speeds([llama], num_prompt=8, num_new=2, rounds=1)
    assert speed.prefill_tokens_per_s > 0
    assert speed.decode_tokens_per_s > 0
