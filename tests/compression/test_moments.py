"""Sums add, shards and resumed passes equal one pass, and a damaged file says so."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from conftest import make_ids, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal.linearity.accumulate import count_held_out, measure_moments
from shoal.linearity.gram import Gram, multiply_rows
from shoal.linearity.moments import Moments
from shoal.linearity.sinks import find_sinks, measure_norms
from shoal.models.structure import watch_boundaries
from shoal.text.windows import TokenWindows


def assert_same_gram(found: Gram, expected: Gram, *, rtol: float = 1e-10, atol: float = 1e-9) -> None:
    for f in fields(Gram):
        torch.testing.assert_close(getattr(found, f.name), getattr(expected, f.name), rtol=rtol, atol=atol)


def assert_same(found: Moments, expected: Moments, *, rtol: float = 1e-10) -> None:
    for name, gram in expected.grams.items():
        assert_same_gram(getattr(found, name), gram, rtol=rtol)
    for name in ("norm_ratio_sum", "cosine_sum", "similarity", "num_compared", "sink_norm_ratio"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=rtol, atol=1e-9)
    assert (found.num_windows, found.source) == (expected.num_windows, expected.source)


def gram_of(x: torch.Tensor, y: torch.Tensor) -> Gram:
    gram = Gram.zeros(1, x.shape[1], y.shape[1])
    gram.add(0, x, y)
    return gram


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 99))
@settings(max_examples=30)
def test_sums_over_shards_add_up_to_the_whole(num_rows, cut, seed):
    x, y = torch.randn(2, num_rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cut = min(cut, num_rows)
    assert_same_gram(gram_of(x[:cut], y[:cut]) + gram_of(x[cut:], y[cut:]), gram_of(x, y))


@given(st.integers(2, 30), st.integers(0, 99))
@settings(max_examples=30)
def test_centred_sums_are_those_of_centred_rows(num_rows, seed):
    x, y = 3 + torch.randn(2, num_rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    xx, xy, yy = gram_of(x, y).centred()
    x, y = x - x.mean(0), y - y.mean(0)
    for found, expected in ((xx, x.T @ x), (xy, x.T @ y), (yy, y.square().sum())):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_rows_that_are_not_kept_do_not_count():
    x, y = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))
    keep = torch.arange(20) % 3 > 0
    masked = Gram.zeros(1, 4, 4)
    masked.add(0, x.masked_fill(~keep[:, None], 0), y, keep)
    assert_same_gram(masked, gram_of(x[keep], y[keep]), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_of_rows_are_exact(dtype):
    """Whole numbers, whose sums float32 holds, come out to the last bit; float16 would overflow at 65,504."""
    x, y = torch.randint(-99, 100, (2, 1000, 16), generator=torch.Generator().manual_seed(0)).to(dtype)
    (found,) = multiply_rows(x, y)
    assert found.dtype == torch.promote_types(torch.float32, dtype)
    assert torch.equal(found.double(), x.double().T @ y.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_short_floats_lose_nothing(dtype):
    x, y = torch.randn(2, 500, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(multiply_rows(x, y)[0].double(), x.double().T @ y.double(), rtol=1e-5, atol=1e-3)


def test_moments_are_those_of_the_stream(llama, windows):
    """Every second batch is held out, and a window's first token is apart."""
    moments = measure_moments(llama, windows, batch_size=8)
    assert not moments.ordinary.xx.requires_grad  # or every pass would be kept, to be differentiated
    rows: list[list[torch.Tensor]] = [[] for _ in range(6)]
    with torch.no_grad(), watch_boundaries(llama, lambda boundary, stream: rows[boundary].append(stream.double())):
        for ids in windows.ids.split(8):
            llama(input_ids=ids)
    assert moments.num_windows == 64
    assert moments.num_tokens == windows.num_tokens
    for block in range(5):
        for half, gram in ((slice(0, None, 2), moments.ordinary), (slice(1, None, 2), moments.held_ordinary)):
            x, y = (torch.cat(rows[boundary][half])[:, 1:].flatten(0, 1) for boundary in (block, block + 1))
            assert_same_gram(gram[block], gram_of(x, y), rtol=1e-4, atol=1e-2)
        assert int(moments.sinks.num_tokens[block]) == 32


def test_two_shards_are_one_pass(llama, windows):
    whole = measure_moments(llama, windows, batch_size=4)
    shards = [windows.take(0, 32), windows.take(32, 64)]
    first, second = (measure_moments(llama, shard, batch_size=4, text_sha256=windows.sha256) for shard in shards)
    assert_same(first + second, whole)


@pytest.mark.parametrize("other", ["model", "text"])
def test_moments_of_other_models_or_texts_do_not_add(llama, windows, other):
    model = make_model("llama", seed=1) if other == "model" else llama
    text = windows if other == "model" else TokenWindows(make_ids(8, 32, seed=1), "other")
    with pytest.raises(ValueError, match="do not add"):
        measure_moments(llama, windows.take(0, 8)) + measure_moments(model, text.take(0, 8))


def test_moments_survive_their_file(llama, windows, tmp_path):
    moments = measure_moments(llama, windows.take(0, 8))
    moments.save(tmp_path / "moments.safetensors")
    assert_same(Moments.load(tmp_path / "moments.safetensors"), moments, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["moments.safetensors"]


class Interrupted(Exception):
    pass


def interrupt_at(num_windows: int):
    def listen(done: int) -> None:
        if done >= num_windows:
            raise Interrupted

    return listen


def test_an_interrupted_pass_goes_on_where_it_was(llama, windows, tmp_path):
    file, heard = tmp_path / "moments.safetensors", []
    with pytest.raises(Interrupted):
        measure_moments(llama, windows, batch_size=2, save_to=file, on_progress=interrupt_at(40))
    assert Moments.load(file).num_windows == 32
    resumed = measure_moments(llama, windows, batch_size=2, save_to=file, on_progress=heard.append)
    assert heard == list(range(34, 66, 2))
    assert_same(resumed, measure_moments(llama, windows, batch_size=2))
    assert_same(Moments.load(file), resumed, rtol=0)


def test_a_finished_pass_is_not_run_again(llama, windows, tmp_path):
    file = tmp_path / "moments.safetensors"
    done = measure_moments(llama, windows, save_to=file)
    assert_same(measure_moments(llama, windows, save_to=file, on_progress=interrupt_at(0)), done, rtol=0)


@pytest.mark.parametrize("other", ["model", "text"])
def test_a_file_of_another_pass_is_not_gone_on_from(llama, windows, tmp_path, other):
    file = tmp_path / "moments.safetensors"
    measure_moments(llama, windows, save_to=file)
    model = make_model("llama", seed=1) if other == "model" else llama
    text = windows if other == "model" else TokenWindows(make_ids(8, 32, seed=1), "other")
    assert_same(measure_moments(model, text, save_to=file), measure_moments(model, text), rtol=0)


@pytest.mark.parametrize("size", [0, 5, 100, -8])
def test_a_damaged_file_names_the_remedy(llama, windows, tmp_path, size):
    file = tmp_path / "moments.safetensors"
    measure_moments(llama, windows.take(0, 4), save_to=file)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"moments\.safetensors.* is damaged .*delete it and measure again"):
        measure_moments(llama, windows.take(0, 4), save_to=file)


def test_a_file_of_something_else_names_the_remedy(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        Moments.load(tmp_path / "model.safetensors")


def test_sinks_are_first_tokens_and_massive_ones():
    stream = torch.ones(2, 6, 4)
    stream[1, 3] *= 9
    norm, ratio = measure_norms(stream)
    assert norm.shape == (12,)
    assert find_sinks(ratio).view(2, 6).nonzero().tolist() == [[0, 0], [1, 0], [1, 3]]


def test_a_single_window_is_measured(llama, windows):
    assert measure_moments(llama, windows.take(0, 1)).num_tokens == 32


@pytest.mark.parametrize("num_windows", [1, 2, 3, 9, 20, 24])
def test_the_size_of_the_held_out_half_is_known_before(llama, windows, num_windows):
    moments = measure_moments(llama, windows.take(0, num_windows))
    for pair in range(moments.num_blocks):
        held = moments.held_ordinary.num_tokens[pair] + moments.held_sinks.num_tokens[pair]
        assert int(held) == 32 * count_held_out(num_windows) <= 16 * num_windows
