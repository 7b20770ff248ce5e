"""A model and its tokenizer, by Hub id, folder, GGUF file or packaged alias (see `packaged`); dtype and device."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shoal.checkpoints.packaged import ALIASES, cache_folder, convert_packaged, gguf_arguments
from shoal.checkpoints.plain_stream import refuse_side_channels, require_plain_stream
from shoal.checkpoints.readable import (
    ask_for_dequantised,
    forget_quantisation,
    refuse_adapter,
    refuse_packed,
    refuse_unplaced,
)
from shoal.files import require_path
from shoal.large.memory import find_free_bytes, give_back_freed_memory, keep_freed_memory
from shoal.large.on_disk import keep_blocks_on_disk, named_weights, place_blocks
from shoal.models import modeling_shoal
from shoal.models.structure import find_stacks, holds_own_modules, is_causal, is_encoder
from shoal.recipe import Recipe

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
    any_kind: bool = False,
) -> PreTrainedModel:
    """The causal language model `name` in evaluation mode; `streamed`, with its blocks on disk (see `shoal.large.on_disk`).

    Code that comes with a model is never run: Shoal's own kinds and the families of transformers load without it.

    With `any_kind` also an encoder, with its masked-LM head if it has one, or an encoder-decoder.

    Raises ValueError if there is no such model, or if it is not of that kind.
    """
    device = device or choose_device()
    torch_dtype = _read_dtype(dtype, device)
    if device.type == "cpu":
        give_back_freed_memory() if streamed else keep_freed_memory()
    folder, extra = _locate(name, revision)
    try:
        if streamed and "gguf_file" in extra:
            raise ValueError("a GGUF file cannot be streamed; convert it to safetensors first")
        config = _read_config(folder, extra)
        if streamed or not any_kind:
            _refuse_encoders(config)
        refuse_side_channels(config)
        dequantised = ask_for_dequantised(config)
        if streamed and dequantised:
            raise ValueError(
                "its weights are quantised, and are not streamed so; load it whole once and save it dequantised"
            )
        model, report = _read_weights(config, folder, extra, torch_dtype, device if streamed else None)
        forget_quantisation(model)
        refuse_unplaced(model, report["unexpected_keys"], dequantised=dequantised)
        if not dequantised and "gguf_file" not in extra:
            refuse_packed(model, folder, revision)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load model {name!r}: {_explain(error)}") from error
    missing = sorted(report["missing_keys"])
    if is_encoder(config) and missing and all(key.startswith("pooler.") for key in missing):
        model.pooler, missing = None, []  # type: ignore[assignment]  # no block needs it, and random weights must not be saved as the model's
    if missing:
        made_as = ", ".join(model.config.architectures or ["?"])
        raise ValueError(
            f"cannot load model {name!r}: its files lack {len(missing)} weights, {missing[0]!r} for one; it was saved as "
            f"{made_as}, which may lack the language-model head"
        )
    if streamed:
        keep_blocks_on_disk(model, device)
    else:
        model.to(device)  # type: ignore[arg-type]
    model.eval()
    try:
        _try_out(model)
    except ValueError as error:
        raise ValueError(f"cannot use model {name!r}: {error}") from error
    return model


def _read_weights(
    config: PretrainedConfig, folder: str, extra: dict, dtype: torch.dtype, streamed_to: torch.device | None
) -> tuple[PreTrainedModel, dict]:
    """The model, and transformers' report of what its files lack; its blocks stay on disk if it is streamed to a device."""
    arguments = {"dtype": dtype, "output_loading_info": True, "trust_remote_code": False, **extra}
    if hasattr(config, "quantization_config"):
        arguments["config"] = config
    if _is_own(config):
        if streamed_to is not None:
            raise ValueError("it holds linear blocks, which are not streamed; load it as a whole")
        assert config.architectures  # `_find_shoal_class` has looked
        return getattr(modeling_shoal, config.architectures[0]).from_pretrained(folder, **arguments)
    if streamed_to is not None:
        arguments |= place_blocks(lambda: AutoModelForCausalLM.from_config(config, dtype=dtype), streamed_to)
    model, report = _choose_class(config).from_pretrained(folder, **arguments)
    if report["missing_keys"] and is_encoder(config):
        # Without the masked-LM head, as the class that the files name; `BertModel` where they name none that there is.
        own = getattr(transformers, (config.architectures or [""])[0], AutoModel)
        model, report = own.from_pretrained(folder, **arguments)
    return model, report


def _choose_class(config: PretrainedConfig):
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    return AutoModelForMaskedLM if is_encoder(config) else AutoModelForCausalLM


def _refuse_encoders(config: PretrainedConfig) -> None:
    if not is_causal(config):
        kind = "an encoder-decoder" if config.is_encoder_decoder else "an encoder"
        raise ValueError(
            f"it is {kind} ({config.model_type}), and this needs a causal decoder; "
            "`shoal profile` and `shoal compress` take it"
        )


def _find_shoal_class(folder: str, extra: dict) -> str | None:
    """The class of a compressed model that holds linear blocks or factored projections; None for stock models.

    Raises ValueError where it is none of `modeling_shoal`.
    """
    if "gguf_file" in extra:
        return None
    try:
        config, _ = PretrainedConfig.get_config_dict(folder, revision=extra.get("revision"))
    except OSError:
        return None  # whoever loads it says why
    if not str(config.get("model_type")).startswith("shoal-"):
        return None
    class_name = str((config.get("architectures") or [""])[0])
    if not class_name.startswith(modeling_shoal.PREFIX):
        raise ValueError(f"its config.json names no class of Shoal: architectures is {config.get('architectures')}")
    return class_name


def _is_own(config: PretrainedConfig) -> bool:
    """Whether it is the configuration of a model that holds linear blocks or factored projections."""
    return type(config).__module__ == modeling_shoal.__name__


def make_skeleton(name: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model without its weights, from its configuration alone: parameters on the meta device.

    Raises ValueError if there is no such configuration.
    """
    config = read_config(name, revision=revision)  # this may unpack a packaged model, and must write real weights then
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"cannot load model {name!r}: {_explain(error)}") from error


def read_config(name: str, *, revision: str | None = None) -> PretrainedConfig:
    """The model's configuration, without its weights. Raises ValueError if there is none."""
    folder, extra = _locate(name, revision)
    try:
        return _read_config(folder, extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"cannot read the configuration of {name!r}: {_explain(error)}") from error


def _read_config(folder: str, extra: dict) -> PretrainedConfig:
    if "gguf_file" not in extra:
        refuse_adapter(folder, extra.get("revision"))
    arguments = {name: value for name, value in extra.items() if name != "quantization_config"}
    if class_name := _find_shoal_class(folder, extra):
        return getattr(modeling_shoal, class_name).config_class.from_pretrained(folder, **arguments)
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, **arguments)


def _read_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype] if dtype else choose_dtype(device)


def is_memory_short(name: str, *, revision: str | None = None, dtype: str | None = None, num_copies: int = 1) -> bool:
    """Whether this machine's free memory would not hold that many copies of the model and its moments.

    False for models that cannot be streamed.
    """
    if name.endswith(".gguf"):
        return False
    config = read_config(name, revision=revision)
    if _is_own(config) or not is_causal(config):
        return False
    device = choose_device()
    skeleton = make_skeleton(name, revision=revision, dtype=_read_dtype(dtype, device))
    weights = sum(p.nbytes for p in {id(p): p for p in skeleton.parameters()}.values())
    text = skeleton.config.get_text_config(decoder=True)
    # Four sets of two float64 matrices a block (see `shoal.linearity.moments`).
    return num_copies * weights + 64 * text.num_hidden_layers * text.hidden_size**2 > find_free_bytes(device)


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with model `name`."""
    folder, extra = _locate(name, revision)
    extra.pop("quantization_config", None)
    try:
        if "gguf_file" not in extra:
            refuse_adapter(folder, revision)
        if _find_shoal_class(folder, extra):
            # With the configuration given, nothing asks whether to run the folder's code.
            extra["config"] = _read_config(folder, extra)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"cannot load the tokenizer of {name!r}: {_explain(error)}") from error


def check_model(name: str, *, revision: str | None = None) -> None:
    """What can be told of a model in a moment, without its weights. Raises ValueError if it cannot be loaded."""
    load_tokenizer(name, revision=revision)
    folder, extra = _locate(name, revision)
    extra.pop("quantization_config", None)
    try:
        config = _read_config(folder, extra)
        _refuse_encoders(config)
        refuse_side_channels(config)
        ask_for_dequantised(config)
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


def recipe_of(name: str) -> Recipe | None:
    """The recipe in a compressed model's folder, None for other models. Raises ValueError for a damaged one or a URI."""
    require_path(name, "model")
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
    require_path(name, "model")
    if name in ALIASES:
        return str(convert_packaged(name)), {}
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ValueError(f"GGUF file {name!r} does not exist; check the path")
        return str(path.parent), gguf_arguments(path)
    if path.is_dir():
        return name, {}
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(
            f"model folder {name!r} does not exist; check the path, or give a Hub id or one of {', '.join(ALIASES)}"
        )
    return name, {"revision": revision} if revision else {}


@torch.no_grad()
def _try_out(model: PreTrainedModel) -> None:
    """Raises ValueError if the blocks hand on more than a stream, or a later token changes the logits of an earlier one."""

    def read(ids: Tensor) -> Tensor | None:
        if not is_causal(model.config):
            find_stacks(model)[0].read(ids)
            return None
        return model(input_ids=ids, use_cache=False).logits.float()

    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=model.device)
    # What holds linear blocks was made of a model that suits.
    logits = read(ids) if holds_own_modules(model) else require_plain_stream(model, ids, read)
    if logits is None:
        return
    # Two rows of one batch are computed alike: only rounding is left, relative to the largest logit.
    tolerance = float(logits.abs().max()) * (1e-4 if model.dtype == torch.float32 else 1e-2)
    if not torch.allclose(logits[0, :3], logits[1, :3], rtol=0, atol=tolerance, equal_nan=True):
        raise ValueError(f"{model.config.model_type} looks at later tokens: it is an encoder; Shoal needs a causal decoder")


def _explain(error: Exception) -> str:
    """The part of a transformers error that tells a user something, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "is not a valid model identifier" in text or "couldn't connect" in text or "offline" in text.lower():
        return "no such folder, no such model on the Hub, or the Hub cannot be reached; check the name and the network"
    if "custom code" in text:
        return (
            "it needs code that comes with it, and Shoal runs none; take a checkpoint of a family that transformers has "
            "(many were converted: look for -hf in the name)"
        )
    if "GGUF" in text or "gguf" in text:
        return f"transformers cannot read this GGUF file ({text[:200]}); convert the model to safetensors first"
    return text[:600]
