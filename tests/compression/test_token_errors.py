"""Errors of single tokens: quantiles, histograms, and the tokens that lead."""

from __future__ import annotations

import pytest
import torch
from conftest import linear_network
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.token_errors import (
    EDGES,
    count_errors,
    find_nonlinear_tokens,
    measure_token_errors,
    take_quantiles,
)
from shoal.models.structure import find_stacks


def test_every_token_has_an_error_in_every_block(llama, windows):
    errors = measure_token_errors(find_stacks(llama)[0], windows.take(0, 8), measure_moments(llama, windows))
    assert errors.shape == (5, 8 * 32) and bool((errors > 0).all())
    quantiles = torch.tensor(take_quantiles(errors))
    assert quantiles.shape == (5, 4)
    assert torch.allclose(quantiles[:, 0], errors.quantile(0.5, dim=1)) and torch.equal(quantiles[:, 3], errors.amax(1))


def test_errors_of_a_linear_network_vanish(llama, windows):
    moments = measure_moments(linear_network(llama), windows)
    assert float(measure_token_errors(find_stacks(llama)[0], windows.take(0, 8), moments).max()) < 1e-3


def test_a_histogram_counts_every_token_once():
    errors = torch.tensor([[1e-9, 0.5, 0.5, 1e9], [EDGES[3] * 1.01] * 4])
    counts = count_errors(errors)
    assert [sum(row) for row in counts] == [4, 4]
    assert counts[0][0] == 1 and counts[0][-1] == 1 and max(counts[0]) == 2
    assert counts[1][3] == 4


def test_the_token_with_the_largest_error_is_found_with_its_text(windows, tokenizer):
    text = "The sea was calm, and the ship lay still. Nobody spoke."
    ids = torch.tensor(tokenizer(text)["input_ids"])[None]
    errors = torch.full((3, ids.shape[1]), 0.1)
    place = text.index("calm")
    errors[1, place] = 5.0
    first, *_ = find_nonlinear_tokens(errors, type(windows)(ids, "sea"), tokenizer, count=2)
    assert (first.token, first.position, first.block) == ("c", place, 1)
    assert first.before == text[place - 10 : place] and first.after == text[place + 1 : place + 5]
    assert first.error == pytest.approx(5.0) and first.times_median == pytest.approx((1 + 50 + 1) / 3)
