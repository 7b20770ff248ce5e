"""What goes wrong with one request ends that request alone: beside it, an ordinary one gets what it always gets."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal_services.serving.engine.decoder import BatchedDecoder
from shoal_services.serving.engine.engine import Engine
from shoal_services.serving.engine.generation import Delta, Generation, OutOfMemory, RequestFailed, Sampling

ORDINARY = Generation(tuple(b"The sea"), 6, Sampling(temperature=0.8, seed=3), ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_random: str) -> Iterator[Engine]:
    def make_decoder() -> BatchedDecoder:
        return BatchedDecoder(load_model(tiny_random, dtype="float32"), max_batch_size=3)

    made = Engine(make_decoder, load_tokenizer(tiny_random), max_context=256)
    yield made
    made.close()


@pytest.fixture(scope="module")
def usual(engine: Engine) -> Delta:
    return asyncio.run(engine.generate(ORDINARY))


def ask_beside(engine: Engine, *odd: Generation) -> list[Delta | BaseException]:
    """What the odd requests got, and last what the ordinary one got that began with them."""

    async def ask() -> list[Delta | BaseException]:
        asked = (engine.generate(request) for request in (*odd, ORDINARY))
        return list(await asyncio.gather(*asked, return_exceptions=True))

    return asyncio.run(ask())


SMALLEST = 5e-324
SAMPLING = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, SMALLEST, 1e-300, 1e-38, 1e-9, 1.0, 2.0]),
    top_p=st.sampled_from([SMALLEST, 1e-9, 0.5, 1 - 1e-16, 1.0]),
    top_k=st.sampled_from([0, 1, 257, 2**31, 2**70]),
    presence_penalty=st.sampled_from([-2.0, 0.0, SMALLEST, 2.0]),
    frequency_penalty=st.sampled_from([-2.0, 0.0, 2.0]),
    seed=st.none() | st.sampled_from([0, -1, -(2**63), 2**63 - 1]),
    num_logprobs=st.none() | st.sampled_from([0, 1, 20, 10_000]),
)
REQUESTS = st.builds(
    Generation,
    prompt_ids=st.lists(st.integers(0, 256) | st.sampled_from([0, -1, 257, 2**31, 2**70]), max_size=12).map(tuple),
    max_tokens=st.sampled_from([0, 1, 2, 9, 10**9]),
    sampling=SAMPLING,
    stop=st.lists(st.text(min_size=1, max_size=5) | st.just("x" * 200), max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    echo=st.booleans(),
)


@settings(max_examples=30)
@given(odd=REQUESTS)
def test_no_request_takes_another_with_it(engine: Engine, usual: Delta, odd: Generation):
    answer, ordinary = ask_beside(engine, odd)
    assert ordinary == usual
    possible = 0 < len(odd.prompt_ids) <= 256 - odd.max_tokens and all(0 <= token <= 256 for token in odd.prompt_ids)
    assert isinstance(answer, Delta if possible else ValueError), answer


@pytest.mark.parametrize("where", ["prefill", "memory", "listen", "sample"])
def test_an_error_ends_the_request_that_it_came_with(engine: Engine, usual: Delta, where: str):
    """Also one that is neither in the queue nor in a row any more, or not yet."""
    odd = Generation((7, 7, 7), 5, Sampling(temperature=1.0, seed=1))

    def stumble(_model: torch.nn.Module, _args: tuple, given: dict, output: Any) -> None:
        if given["input_ids"].tolist() == [[7, 7, 7]]:
            if where == "sample":
                output.logits.fill_(math.nan)
            else:
                said = {"prefill": "a bad shape", "memory": "DefaultCPUAllocator: can't allocate memory"}
                raise RuntimeError(said[where])

    def fail_to_listen(_delta: Delta) -> None:
        raise OSError("nobody there")

    async def ask() -> list[Delta | BaseException]:
        asked = (engine.generate(odd, *([fail_to_listen] if where == "listen" else [])), engine.generate(ORDINARY))
        return list(await asyncio.gather(*asked, return_exceptions=True))

    hook = None if where == "listen" else engine.decoder.model.register_forward_hook(stumble, with_kwargs=True)
    answer, ordinary = asyncio.run(ask())
    if hook:
        hook.remove()
    assert type(answer) is (OutOfMemory if where == "memory" else RequestFailed)
    assert ordinary == usual and ask_beside(engine, ORDINARY, ORDINARY) == [usual] * 3


def test_an_engine_that_can_answer_nobody_ends(tiny_random: str):
    decoder = BatchedDecoder(load_model(tiny_random, dtype="float32"), max_batch_size=2)
    engine = Engine(lambda: decoder, load_tokenizer(tiny_random), max_context=64)

    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    decoder.model.register_forward_pre_hook(fail)
    assert all("the device is gone" in str(answer) for answer in ask_beside(engine, ORDINARY))
    engine._thread.join(20)
    assert "the device is gone" in str(engine.failure)


def test_where_memory_is_short_the_longest_goes(engine: Engine, usual: Delta, monkeypatch: pytest.MonkeyPatch):
    step = engine.decoder.step

    def step_one(tokens: list[int]) -> torch.Tensor:
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(tokens)

    monkeypatch.setattr(engine.decoder, "step", step_one)
    answer, ordinary = ask_beside(engine, Generation(tuple(range(1, 40)), 5))
    assert isinstance(answer, OutOfMemory) and ordinary == usual


def test_numbers_that_are_none_leave_nothing_behind():
    """What is masked is multiplied by 0, which NaN would survive: a row that held some is used again."""
    model = make_model("llama")
    decoder = BatchedDecoder(model, max_batch_size=4)  # packs the head's weights, which the embeddings are too
    with torch.no_grad():
        model.get_input_embeddings().weight[100] = math.nan

    def continue_beside_another() -> list[int]:
        tokens = [int(decoder.prefill([5, 6, 7], room=8)[-1].argmax())]
        for _ in range(5):
            tokens.append(int(decoder.step([3, tokens[-1]])[-1].argmax()))
        decoder.release(1)
        return tokens

    decoder.prefill([8, 9], room=8)
    usual = continue_beside_another()
    decoder.prefill([100] * 30, room=8)
    decoder.release(1)
    assert continue_beside_another() == usual


def test_a_model_with_more_logits_than_embeddings_picks_what_it_can_read():
    model = make_model("llama")
    model.lm_head = torch.nn.Linear(32, 200)
    decoder = BatchedDecoder(model, max_batch_size=2)
    assert decoder.prefill([5, 6], room=2).shape == decoder.step([1]).shape == (1, 128)


# Memory


def test_one_long_request_costs_its_own_length():
    decoder = BatchedDecoder(make_model("llama"), max_batch_size=16, max_cached=7000)

    def count_cached() -> int:
        held = [cache.kv_layers[0].keys for cache in decoder.caches]
        return sum(buffer.shape[0] * buffer.shape[2] for buffer in held)

    for _ in range(8):
        decoder.prefill([5, 6, 7], room=100)
    assert count_cached() == 8 * 256
    decoder.prefill([5, 6, 7], room=2000)
    decoder.prefill([5, 6, 7], room=2000)
    assert count_cached() == 8 * 256 + 2 * 2048, "in a cache of their own, as 16 rows of that length would be too much"
    assert not decoder.has_room(2000) and decoder.has_room(200)
    assert decoder.step([1] * 10).shape == (10, 128)
    for _ in range(10):
        decoder.release(0)
    assert (decoder.size, count_cached()) == (0, 0)


def test_those_that_do_not_fit_wait_for_those_that_run(tiny_random: str):
    def make_decoder() -> BatchedDecoder:
        return BatchedDecoder(load_model(tiny_random, dtype="float32"), max_batch_size=8, max_cached=512)

    engine = Engine(make_decoder, load_tokenizer(tiny_random), max_context=256)
    requests = [Generation(tuple(b"The sea"), 5 + 3 * i, Sampling(seed=i), ignore_eos=True) for i in range(8)]

    async def ask_all() -> list[Delta]:
        sizes: list[int] = []
        asked = (engine.generate(r, lambda _: sizes.append(engine.decoder.size)) for r in requests)
        answers = await asyncio.gather(*asked)
        assert max(sizes) == 2
        return list(answers)

    together = asyncio.run(ask_all())
    assert together == [asyncio.run(engine.generate(request)) for request in requests]
    engine.close()


def test_a_context_that_memory_cannot_hold_is_refused_at_the_start(tiny_random: str):
    def make_decoder() -> BatchedDecoder:
        return BatchedDecoder(load_model(tiny_random, dtype="float32"), max_cached=100)

    with pytest.raises(ValueError, match=r"a context of 200 tokens takes .* lower max_context"):
        Engine(make_decoder, load_tokenizer(tiny_random), max_context=200)


def test_a_batch_of_one_is_a_batch(tiny_random: str):
    decoder = BatchedDecoder(load_model(tiny_random, dtype="float32"), max_batch_size=1)
    decoder.prefill([5, 6], room=2)
    assert not decoder.has_room(3)
