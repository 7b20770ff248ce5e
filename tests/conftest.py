"""Tiny random models of every family, tiny texts, and one local Ray for the whole run."""

from __future__ import annotations

import json
import math
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# As in an activated environment: a job of the shared Ray runs the command `shoal`.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])

# Ray's workers know the modules beside this one too.
os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers
from commands import shoal  # noqa: F401  a fixture
from shoal.checkpoints.load import load_tokenizer
from shoal.linearity.moments import Moments
from shoal.models.structure import find_blocks
from shoal.point import Evaluation, Point, Size, Speed
from shoal.recipe import Recipe
from shoal.replace.maps import AffineMap
from shoal.text.windows import TokenWindows
from shoal.texts import Text

pytest.register_assert_rewrite("searches")

# A busy machine is slow, not wrong.
hypothesis.settings.register_profile("shoal", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("shoal")

# Tiny tensors: more threads gain nothing, and wait for each other where other programs use the cores.
torch.set_num_threads(1)

COMMON = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT = {"vocab_size": 128, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {**COMMON, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**COMMON, "sliding_window": 8}),
    "qwen3": ("Qwen3", {**COMMON, "head_dim": 8, "use_sliding_window": True, "sliding_window": 8, "layer_types": MIXED}),
    "gemma": ("Gemma", {**COMMON, "head_dim": 8}),
    "gemma2": ("Gemma2", {**COMMON, "head_dim": 8, "sliding_window": 8, "layer_types": MIXED}),
    "gemma3": ("Gemma3", {**COMMON, "head_dim": 8, "sliding_window": 8, "layer_types": MIXED}),
    "phi3": ("Phi3", COMMON),
    "gpt2": ("GPT2", GPT),
    "gpt_neox": ("GPTNeoX", COMMON),
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "opt": ("OPT", {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", {"vocab_size": 128, "hidden_size": 32, "n_layer": 5, "n_head": 4}),
    "falcon": ("Falcon", {**COMMON, "parallel_attn": True, "new_decoder_architecture": False}),
}


def make_model(family: str, *, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model of 5 blocks and 32 dimensions, float32, on the CPU."""
    prefix, arguments = FAMILIES[family]
    config_class = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**arguments))
    # Random weights of .02 leave every block close to the identity: larger ones make them matter.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(6)
    return model.eval()


def make_ids(num_windows: int, window: int, *, vocab_size: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, vocab_size, (num_windows, window), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    """A tiny random model, of each family in turn."""
    return make_model(request.param)


@pytest.fixture
def llama() -> transformers.PreTrainedModel:
    return make_model("llama")


@pytest.fixture(scope="session")
def windows() -> TokenWindows:
    """64 windows of 32 random tokens."""
    return TokenWindows(make_ids(64, 32), "random")


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny_random(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The packaged model of random weights, made in a cache folder of this run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield "tiny-random"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray of two CPUs for all tests that run in this process; searches bring their own, in theirs."""
    import ray
    from shoal_services.cluster.connect import connect

    connect(None, num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture
def tokenizer(tiny_random: str) -> transformers.PreTrainedTokenizerBase:
    """A byte tokenizer of 257 tokens that puts nothing before a text."""
    return load_tokenizer(tiny_random)


@pytest.fixture
def bos_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase) -> transformers.PreTrainedTokenizerBase:
    """The same with token 0 before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    return tokenizer


def write_prose(path: Path, *, num_sentences: int = 1500, seed: int = 0) -> Path:
    """A text file of sentences of random words, none of them twice."""
    draw = torch.randint(97, 123, (num_sentences, 8, 5), generator=torch.Generator().manual_seed(seed)).tolist()
    lines = [" ".join("".join(map(chr, word)) for word in words) + ".\n" for words in draw]
    path.write_text("".join(lines))
    return path


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def write_task(folder: Path, name: str, *, num_examples: int = 24, data: str | None = None) -> Path:
    """A task file of two choices, as lm-eval reads them, and its data beside it."""
    choices = [" red", " blue"]
    rows = [{"question": f"Thing {i} is", "choices": choices, "label": i * 7 % 3 % 2} for i in range(num_examples)]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data or f"{name}.jsonl"))
    return folder / f"{name}.yaml"


def moments_of(stream_lnd: torch.Tensor) -> Moments:
    """Moments of rows at L+1 boundaries in float64, without sinks; every other row is held out."""
    unit = torch.nn.functional.normalize(stream_lnd, dim=-1)
    moments = Moments.zeros(len(stream_lnd) - 1, stream_lnd.shape[-1], "by hand")
    for block, (x, y) in enumerate(pairwise(stream_lnd)):
        moments.ordinary.add(block, x[::2], y[::2])
        moments.held_ordinary.add(block, x[1::2], y[1::2])
        moments.norm_ratio_sum[block] = ((y - x).norm(dim=1) / y.norm(dim=1)).sum()
        moments.cosine_sum[block] = (unit[block] * unit[block + 1]).sum()
    moments.similarity += torch.einsum("lnd,mnd->lm", unit, unit)
    moments.num_compared += stream_lnd.shape[1]
    moments.sink_norm_ratio += 1
    return moments


def make_affine(model: transformers.PreTrainedModel, block: int, *, seed: int = 0) -> None:
    """Makes a block of the model exactly affine, in place: x → x + A x + b."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    update, bias = torch.randn(width, width, generator=generator) / width, torch.randn(width, generator=generator) / 100
    find_blocks(model)[block].forward = lambda hidden_states, **_: hidden_states + hidden_states @ update + bias


def linear_network(model: transformers.PreTrainedModel, *, seed: int = 0) -> transformers.PreTrainedModel:
    """The model with every block affine."""
    for block in range(len(find_blocks(model))):
        make_affine(model, block, seed=seed + block)
    return model


def make_point(num_parameters: int, perplexity: float, *, artefact: Path | None = None, **recipe: object) -> Point:
    """A point as a search makes them, of this size and perplexity."""
    text = Text(name="prose", sha256="0123456789abcdef", num_tokens=16384)
    values = {"base_model": "tiny-random", "num_replaced": 2, "blocks": (3, 4), "dtype": "float32", **recipe}
    return Point(
        recipe=Recipe.model_validate(values),
        evaluations=(
            Evaluation(
                text=text, dense_perplexity=9.87, dense_standard_error=0.12,
                perplexity=perplexity, standard_error=perplexity / 64,
                log_ratio=math.log(perplexity / 9.87), log_ratio_standard_error=0.03, kl=0.4, kl_standard_error=0.05,
                top1_agreement=0.9,
            ),
        ),
        size=Size(num_parameters=num_parameters, num_bytes=4 * num_parameters, kv_bytes_per_token=1024),
        dense_size=Size(num_parameters=123_400_000, num_bytes=493_600_000, kv_bytes_per_token=1280),
        speed=Speed(prefill_tokens_per_s=200, decode_tokens_per_s=30),
        dense_speed=Speed(prefill_tokens_per_s=100, decode_tokens_per_s=20),
        artefact=str(artefact) if artefact else None,
    )  # fmt: skip


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without a run: making its tables takes seconds."""
    import mlflow

    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


def same_with_and_without_cache(model, ids) -> bool:
    """Greedy, and logits step by step: a constant token would be equal whatever the cache holds."""
    arguments = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    arguments |= {"eos_token_id": None, "pad_token_id": 0}
    cached, plain = (model.generate(ids, use_cache=use, **arguments) for use in (True, False))
    for with_cache, without in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(with_cache, without, rtol=1e-4, atol=1e-4)
    return bool(torch.equal(cached.sequences, plain.sequences))


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    )


def random_map(seed: int, *, rank: int | None = None) -> AffineMap:
    generator = torch.Generator().manual_seed(seed)
    if rank:
        update = (torch.randn(32, rank, generator=generator) / 8, torch.randn(rank, 32, generator=generator) / 8)
        return AffineMap(update, torch.randn(32, generator=generator))
    return AffineMap(torch.randn(32, 32, generator=generator) / 8, torch.randn(32, generator=generator))
