"""How equal two answers are, and what MLflow is told of many."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal_services.serving.engine.generation import Call, Delta, Piece, Token
from shoal_services.serving.http.record import Comparison, Outcome, RequestRecord, count_equal
from shoal_services.serving.observer import summarise

TOKENS = st.lists(st.integers(0, 3), max_size=8)


@given(TOKENS, TOKENS, TOKENS)
def test_tokens_count_up_to_the_first_difference(common: list[int], ours: list[int], theirs: list[int]):
    equal = count_equal([*common, 7, *ours], [*common, 8, *theirs])
    assert equal == len(common)
    assert count_equal(common, common + theirs) == len(common) == count_equal(common + ours, common)


def test_a_record_ends_once_and_only_answers_have_latencies():
    ended: list[RequestRecord] = []
    for result in ("answered", "left"):
        record = RequestRecord("dense", "tiny", [Call("The sea", 2)], ended.append)
        record.hear(0, Piece(Delta(tokens=(Token(5),)), 3))
        record.hear(0, Piece(Delta(tokens=(Token(6),), finish_reason="length"), 3))
        record.end(result)  # type: ignore[arg-type]
        record.end("failed")
    assert [record.result for record in ended] == ["answered", "left"]
    assert ended[0].tokens == {0: [5, 6]} and ended[0].first_token_ms is not None
    assert ended[0].latency_ms is not None and ended[1].latency_ms is None


def test_what_mlflow_is_told():
    outcomes = [Outcome("tiny", "dense", "answered", 4, 10.0, latency) for latency in (20.0, 40.0)]
    refused = Outcome("tiny", "dense", "refused", 0, None, None)
    metrics = summarise(Counter(answered=2, refused=1), [*outcomes, refused])
    assert metrics["requests"] == 3 and metrics["refused"] == 1
    assert metrics["latency_ms_mean"] == 30 and metrics["latency_ms_mean_standard_error"] == pytest.approx(10)
    assert metrics["first_token_ms_p50"] == 10
    comparisons = [Comparison("a", "b", 4, 4, 10.0, 12.0), Comparison("a", "b", 4, 1, 10.0, 14.0)]
    failed = Comparison("a", "b", 4, 0, 10.0, None)
    metrics = summarise(Counter(answered=2, failed=1), [*comparisons, failed])
    assert metrics["agreement"] == pytest.approx(0.625) and metrics["identical"] == 0.5
    assert metrics["shadow_latency_ms_mean"] == 13 and metrics["failed"] == 1
