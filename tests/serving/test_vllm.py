"""vLLM serves linear kinds and says what `generate` says; where vLLM is installed: `pytest tests/serving/test_vllm.py`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.checkpoints.store import save
from shoal.recipe import Recipe
from shoal.replace.fit import AffineMap
from shoal.replace.maps import Replacement, apply_replacement
from shoal_services.serving.engine.generation import Delta, Generation, QueueFull, Sampling
from shoal_services.serving.settings import Limits, VariantSettings

pytestmark = pytest.mark.slow
pytest.importorskip("vllm")

# vLLM's CPU attention wants heads of 32 dimensions or more: the tiny models of the other tests have smaller ones.
MODEL = "smollm2-135m"
PROMPT = "The history of the city began when"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with two maps: in place of two neighbours, and of one block."""
    model, tokenizer = load_model(MODEL, dtype="float32"), load_tokenizer(MODEL)
    width = model.config.hidden_size
    torch.manual_seed(0)
    maps = {
        block: AffineMap(torch.eye(width) + 0.01 * torch.randn(width, width), 0.1 * torch.randn(width))
        for block in (14, 20)
    }
    apply_replacement(model, Replacement((14, 15, 20), maps=maps))
    folder = tmp_path_factory.mktemp("vllm") / "model"
    save(model, tokenizer, folder, recipe=Recipe(base_model=MODEL, num_replaced=3))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator:
    from shoal_services.serving.engine.vllm_engine import VllmEngine

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    settings = VariantSettings(model=str(folder), engine="vllm", dtype="float32", engine_options={"enforce_eager": True})
    limits = Limits(max_batch_size=4, max_queued=2, max_context=256)
    made = VllmEngine(str(folder), settings, limits, load_tokenizer(str(folder)), lambda: None)
    yield made
    made.close()


def ask(engine, prompt: str, num_new: int, **more) -> Generation:
    ids = tuple(engine._spelling.tokenizer(prompt)["input_ids"])
    return Generation(ids, num_new, Sampling(temperature=0.0, num_logprobs=more.pop("num_logprobs", None)), **more)


def test_vllm_speaks_like_generate(engine, folder: Path):
    async def talk() -> None:
        request, pieces = ask(engine, PROMPT, 20, ignore_eos=True), list[Delta]()
        whole = await engine.generate(request, pieces.append)
        model = load_model(str(folder), dtype="float32")
        ids = torch.tensor([request.prompt_ids])
        expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
        assert [token.id for token in whole.tokens] == expected.tolist()
        assert Delta.join(pieces) == whole and len(pieces) > 1
        assert whole.finish_reason == "length"

        scored = await engine.generate(ask(engine, PROMPT, 0, num_logprobs=1, echo=True))
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits.log_softmax(-1)[0]
        assert (scored.text, scored.tokens, scored.finish_reason) == (PROMPT, (), "length")
        assert "".join(token.text for token in scored.prompt_tokens) == PROMPT
        for position, token in enumerate(scored.prompt_tokens[1:]):
            assert token.logprob == pytest.approx(float(logprobs[position, token.id]), abs=1e-3)

        with pytest.raises(ValueError, match="maximum context length is 256 tokens"):
            await engine.generate(ask(engine, PROMPT, 300))
        many = [engine.generate(ask(engine, PROMPT, 4, ignore_eos=True)) for _ in range(8)]
        answers = await asyncio.gather(*many, return_exceptions=True)
        assert [type(answer) for answer in answers] == [Delta] * 6 + [QueueFull] * 2
        assert engine.statistics.running == 0 and engine.failure is None

    asyncio.run(talk())
