"""Generation in batches is generation alone: for every family, whatever runs beside it, joins it or leaves it."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from conftest import make_ids, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.replace.maps import AffineMap, Replacement, apply_replacement
from shoal.text.windows import TokenWindows
from shoal.thin.sparsify import sparsify
from shoal.thin.svd import factor_weights
from shoal_services.serving.engine.decoder import BatchedDecoder
from shoal_services.serving.engine.engine import Engine
from shoal_services.serving.engine.generation import Delta, Generation, QueueFull, Sampling
from shoal_services.serving.engine.sampling import Sampler
from shoal_services.serving.engine.spelling import Spelling
from shoal_services.serving.engine.text_stream import TextStream
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def continue_alone(model: PreTrainedModel, prompt: list[int], num_new: int) -> list[int]:
    """Greedy tokens after a prompt, from whole forward passes without any cache."""
    ids = list(prompt)
    for _ in range(num_new):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def prompts_of(*lengths: int) -> list[list[int]]:
    return [make_ids(1, length, seed=length)[0].tolist() for length in lengths]


class Rows:
    """Requests in a decoder's rows, and the greedy tokens that each got."""

    def __init__(self, decoder: BatchedDecoder):
        self.decoder = decoder
        self.rows: list[int] = []
        self.tokens: dict[int, list[int]] = {}

    def join(self, name: int, prompt: list[int]) -> None:
        self.tokens[name] = [int(self.decoder.prefill(prompt, room=64)[-1].argmax())]
        self.rows.append(name)

    def step(self) -> None:
        if self.rows:
            picked = self.decoder.step([self.tokens[name][-1] for name in self.rows]).argmax(-1).tolist()
            for name, token in zip(self.rows, picked, strict=True):
                self.tokens[name].append(token)

    def leave(self, row: int) -> None:
        last = self.decoder.release(row)
        self.rows[row] = self.rows[last]
        self.rows.pop()


def test_batched_tokens_are_those_of_each_request_alone(model: PreTrainedModel):
    prompts = prompts_of(5, 17, 30, 9)
    alone = [continue_alone(model, prompt, 12) for prompt in prompts]
    rows = Rows(BatchedDecoder(model, max_batch_size=4, prefill_chunk=8))
    rows.join(0, prompts[0])
    rows.join(1, prompts[1])
    for _ in range(4):
        rows.step()
    rows.join(2, prompts[2])
    rows.leave(0)
    rows.join(3, prompts[3])
    for _ in range(7):
        rows.step()
    for name, tokens in rows.tokens.items():
        assert tokens == alone[name][: len(tokens)]
        assert len(tokens) == {0: 5, 1: 12, 2: 8, 3: 8}[name]


def test_replaced_blocks_take_no_part_in_the_cache(llama: PreTrainedModel):
    torch.manual_seed(0)
    affine = AffineMap(torch.eye(32) + 0.05 * torch.randn(32, 32), torch.randn(32) * 0.1)
    apply_replacement(llama, Replacement((1, 2), maps={1: affine}))
    alone = continue_alone(llama, prompts_of(11)[0], 8)
    decoder = BatchedDecoder(llama, max_batch_size=2)
    rows = Rows(decoder)
    rows.join(0, prompts_of(11)[0])
    for _ in range(7):
        rows.step()
    assert rows.tokens[0] == alone
    assert len(decoder.caches[0].layers) == 3


@pytest.mark.parametrize("units", [("0.attention",), ("1.mlp", 2, "3.attention"), ("2.mlp", "4.attention")])
def test_models_without_attentions_and_mlps_are_served_like_others(llama: PreTrainedModel, units):
    apply_replacement(llama, Replacement(units))
    prompts = prompts_of(5, 17, 9)
    alone = [continue_alone(llama, prompt, 8) for prompt in prompts]
    rows = Rows(BatchedDecoder(llama, max_batch_size=3, prefill_chunk=8))
    for name, prompt in enumerate(prompts):
        rows.join(name, prompt)
    for _ in range(7):
        rows.step()
    assert [rows.tokens[name] for name in range(3)] == alone


def test_thinned_models_are_served_like_others(llama: PreTrainedModel):
    """Factors are linear layers like others: packed, and computed row by row."""
    windows = TokenWindows(make_ids(8, 16), "train")
    apply_replacement(llama, Replacement((2,), maps={2: AffineMap(torch.eye(32) / 20, torch.ones(32) / 10)}))
    factor_weights(llama, windows, 0.8)
    sparsify(llama, windows, "2:4")
    prompts = prompts_of(5, 17)
    alone = [continue_alone(llama, prompt, 8) for prompt in prompts]
    rows = Rows(BatchedDecoder(llama, max_batch_size=2))
    for name, prompt in enumerate(prompts):
        rows.join(name, prompt)
    for _ in range(7):
        rows.step()
    assert [rows.tokens[name] for name in range(2)] == alone


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["join", "step", "step", "leave first", "leave last"]), min_size=1, max_size=25))
def test_no_order_of_joining_and_leaving_changes_a_token(moves: list[str]):
    rows, prompts = Rows(DECODER), prompts_of(*range(3, 30))
    DECODER.clear()
    for move in moves:
        if move == "join" and len(rows.rows) < DECODER.max_batch_size:
            rows.join(len(rows.tokens), prompts[len(rows.tokens)])
        elif move == "step":
            rows.step()
        elif move.startswith("leave") and rows.rows:
            rows.leave(0 if move.endswith("first") else len(rows.rows) - 1)
    for name, tokens in rows.tokens.items():
        assert tokens == ALONE[name][: len(tokens)]


LLAMA = make_model("llama")
DECODER = BatchedDecoder(LLAMA, max_batch_size=4)
ALONE = [continue_alone(LLAMA, prompt, 26) for prompt in prompts_of(*range(3, 30))]


def test_bfloat16_is_served_on_every_processor():
    """Packed where oneDNN has products for it, and as it is elsewhere."""
    model = make_model("llama").to(torch.bfloat16)
    rows = Rows(BatchedDecoder(model, max_batch_size=2))
    rows.join(0, prompts_of(5)[0])
    rows.step()
    assert len(rows.tokens[0]) == 2


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 products are emulated here")
def test_bfloat16_logits_are_the_same_bit_by_bit_whatever_runs_beside():
    model = make_model("llama").bfloat16()
    shared = BatchedDecoder(model, max_batch_size=8)
    apart = BatchedDecoder(model, max_batch_size=8, max_cached=1600)
    prompts, rooms = prompts_of(4, 25, 13), (16, 600, 16)

    def run(names: list[int], decoder: BatchedDecoder = shared) -> dict[int, list[torch.Tensor]]:
        decoder.clear()
        logits = {name: [decoder.prefill(prompts[name], room=rooms[name])[-1]] for name in names}
        for _ in range(6):
            stepped = decoder.step([int(logits[name][-1].argmax()) for name in names])
            for name, row in zip(names, stepped, strict=True):
                logits[name].append(row)
        return logits

    for together in (run([0, 1, 2]), run([0, 1, 2], apart)):
        for name in range(3):
            for one, other in zip(run([name])[name], together[name], strict=True):
                assert torch.equal(one, other)
    assert [len(decoder.caches) for decoder in (shared, apart)] == [1, 2]


def test_a_model_that_cannot_be_batched_is_refused(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llama.model.rotary_emb, "forward", _rotate_by_batch)
    with pytest.raises(ValueError, match="cannot be served in batches"):
        BatchedDecoder(llama, max_batch_size=2)


def _rotate_by_batch(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.full((*position_ids.shape, 8), 0.3 * len(position_ids) * position_ids.shape[1])
    return angle.cos(), angle.sin()


# Sampling


def draw(logits: torch.Tensor, count: int = 400, **rules) -> Counter[int]:
    sampler = Sampler(Sampling(**{"seed": 0, **rules}))
    return Counter(sampler.pick(logits).id for _ in range(count))


def test_temperature_zero_takes_the_likeliest():
    assert draw(torch.tensor([0.0, 2.0, 1.0]), temperature=0.0) == {1: 400}


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    found = draw(logits, 4000)
    for token, probability in enumerate((0.5, 0.3, 0.2)):
        # Five standard errors of a frequency over 4,000 draws.
        assert abs(found[token] / 4000 - probability) < 5 * math.sqrt(probability * (1 - probability) / 4000)


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(draw(logits, top_k=2)) == {0, 1}
    assert set(draw(logits, top_p=0.65)) == {0, 1}
    assert set(draw(logits, top_p=0.01)) == {0}
    # Of the two likeliest, the first holds 4/7.
    assert set(draw(logits, top_k=2, top_p=0.5)) == {0}


def test_a_nucleus_larger_than_the_first_look_is_found():
    assert len(draw(torch.zeros(2000), 4000, top_p=0.9)) > 1000


@given(st.integers(0, 2**63 - 1))
def test_equal_seeds_draw_equal_tokens(seed: int):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    assert draw(logits, 5, seed=seed) == draw(logits, 5, seed=seed)


def test_penalties_push_repeated_tokens_down():
    logits = torch.tensor([1.0, 0.5])
    sampler = Sampler(Sampling(temperature=0.0, frequency_penalty=0.4))
    assert [sampler.pick(logits).id for _ in range(4)] == [0, 0, 1, 0]


def test_log_probabilities_are_the_models_own():
    logits = torch.tensor([2.0, 1.0, 0.0])
    token = Sampler(Sampling(temperature=0.0, num_logprobs=2)).pick(logits)
    expected = logits.log_softmax(-1)
    assert token.logprob == pytest.approx(float(expected[0]))
    assert [(top.id, top.logprob) for top in token.top] == [(i, pytest.approx(float(expected[i]))) for i in (0, 1)]


# Text


@pytest.fixture(scope="module")
def byte_tokenizer(tiny_random: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_random)


def stream_text(tokenizer: PreTrainedTokenizerBase, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(Spelling(tokenizer), stop)
    pieces = []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, True
    return [*pieces, stream.flush()], False


@given(st.text(max_size=30).filter(lambda text: "<|end|>" not in text))
def test_pieces_make_up_the_text(byte_tokenizer: PreTrainedTokenizerBase, text: str):
    pieces, stopped = stream_text(byte_tokenizer, text)
    assert ("".join(pieces), stopped) == (text, False)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string_and_shows_nothing_of_it(
    byte_tokenizer: PreTrainedTokenizerBase, text: str, stop: list[str]
):
    pieces, stopped = stream_text(byte_tokenizer, text, tuple(stop))
    ends = [at + len(word) for word in stop if (at := text.find(word)) >= 0]
    seen = text[: min(ends)] if ends else text
    # The stop string that is complete first ends the text; of several, the one that begins first.
    starts = [at for word in stop if (at := seen.find(word)) >= 0]
    assert ("".join(pieces), stopped) == (seen[: min(starts)] if starts else text, bool(starts))


# Engine


@pytest.fixture
def engine(tiny_random: str, byte_tokenizer: PreTrainedTokenizerBase) -> Iterator[Engine]:
    def make_decoder() -> BatchedDecoder:
        return BatchedDecoder(load_model(tiny_random, dtype="float32"), max_batch_size=4)

    made = Engine(make_decoder, byte_tokenizer, max_context=256)
    yield made
    made.close()


def ask(text: str, num_new: int = 8, *, ignore_eos: bool = True) -> Generation:
    """A greedy request; the byte tokenizer's ids are bytes, in an order of their own."""
    return Generation(tuple(text.encode()), num_new, Sampling(temperature=0.0), ignore_eos=ignore_eos)


def test_greedy_output_is_that_of_generate(engine: Engine, tiny_random: str):
    model = load_model(tiny_random, dtype="float32")
    for text in ("The sea", "a", "Once upon a time there was"):
        ids = torch.tensor([ask(text).prompt_ids])
        expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
        found = asyncio.run(engine.generate(ask(text, 20)))
        assert [token.id for token in found.tokens] == expected.tolist()


def test_more_requests_than_rows_all_get_their_own_answer(engine: Engine):
    texts = [f"request {i} " * (i % 5 + 1) for i in range(11)]

    async def all_at_once() -> list[Delta]:
        return list(await asyncio.gather(*(engine.generate(ask(text, 3 + len(text) % 9)) for text in texts)))

    alone = [asyncio.run(engine.generate(ask(text, 3 + len(text) % 9))) for text in texts]
    assert asyncio.run(all_at_once()) == alone
    assert engine.statistics.requests == 22


def test_one_who_leaves_early_frees_the_row(engine: Engine):
    async def leave_early() -> None:
        first = asyncio.Event()
        loop = asyncio.get_running_loop()
        tasks = [
            asyncio.create_task(engine.generate(ask(f"{i}", 200), lambda _: loop.call_soon_threadsafe(first.set)))
            for i in range(4)
        ]
        await first.wait()
        for task in tasks:
            task.cancel()
        answer = await asyncio.wait_for(engine.generate(ask("last", 2)), 20)
        assert answer.finish_reason == "length"

    asyncio.run(leave_early())
    assert engine.statistics.generated_tokens < 4 * 200


def test_what_does_not_fit_is_refused_with_the_numbers(engine: Engine):
    with pytest.raises(
        ValueError, match=r"maximum context length is 256 tokens; 3 in the prompt and 300 to generate are 303"
    ):
        asyncio.run(engine.generate(ask("abc", 300)))
    with pytest.raises(ValueError, match="no tokens"):
        asyncio.run(engine.generate(ask("")))


def test_what_is_over_the_rows_and_the_queue_is_refused_at_once(engine: Engine):
    async def all_at_once() -> list[Delta | BaseException]:
        asked = (engine.generate(ask(f"{i}", 40)) for i in range(10))
        return list(await asyncio.gather(*asked, return_exceptions=True))

    engine.max_waiting = 3
    answers = asyncio.run(all_at_once())
    assert [type(answer) for answer in answers] == [Delta] * 7 + [QueueFull] * 3
    assert isinstance(asyncio.run(engine.generate(ask("later", 2))), Delta)


def test_one_who_leaves_the_queue_makes_room_in_it(engine: Engine):
    async def leave_the_queue() -> Delta:
        running = [asyncio.create_task(engine.generate(ask(f"{i}", 100))) for i in range(4)]
        leaving = asyncio.create_task(engine.generate(ask("left", 100)))
        await asyncio.sleep(0.1)
        leaving.cancel()
        await asyncio.sleep(0)
        answer = await engine.generate(ask("last", 2))
        await asyncio.gather(*running)
        return answer

    engine.max_waiting = 1
    assert asyncio.run(leave_the_queue()).finish_reason == "length"


def test_the_end_token_ends_the_text(engine: Engine):
    free = asyncio.run(engine.generate(ask("abc", 5)))
    engine.end_tokens = frozenset({free.tokens[2].id})
    ended = asyncio.run(engine.generate(ask("abc", 5, ignore_eos=False)))
    assert (ended.finish_reason, ended.tokens) == (
        "stop",
        free.tokens[: [t.id for t in free.tokens].index(free.tokens[2].id) + 1],
    )


def test_echo_scores_the_prompt(engine: Engine, tiny_random: str):
    ids = tuple(engine.tokenizer("abcd")["input_ids"])
    request = Generation(ids, 0, Sampling(num_logprobs=1), echo=True)
    answer = asyncio.run(engine.generate(request))
    model = load_model(tiny_random, dtype="float32")
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([request.prompt_ids])).logits.log_softmax(-1)[0]
    assert (answer.text, answer.finish_reason, answer.tokens) == ("abcd", "length", ())
    assert answer.prompt_tokens[0].logprob is None
    for position, token in enumerate(answer.prompt_tokens[1:]):
        assert token.logprob == pytest.approx(float(expected[position, token.id]), abs=1e-4)
        assert token.top[0].logprob == pytest.approx(float(expected[position].max()), abs=1e-4)


def test_an_engine_that_fails_says_so_to_all(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    def fail(_tokens: list[int]) -> torch.Tensor:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine.decoder, "step", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the device is gone"):
            asyncio.run(engine.generate(ask("abc", 5)))
