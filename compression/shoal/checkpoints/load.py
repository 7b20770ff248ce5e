"""A model and its tokenizer, by Hub id, folder, GGUF file or packaged alias (see `packaged`); dtype and device."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shoal.checkpoints.config import find_shoal_class, is_own, read_config_at
from shoal.checkpoints.device import choose_device, read_dtype
from shoal.checkpoints.names import explain, locate
from shoal.checkpoints.plain_stream import refuse_side_channels, require_plain_stream
from shoal.checkpoints.readable import (
    ask_for_dequantised,
    forget_quantisation,
    refuse_adapter,
    refuse_packed,
    refuse_unplaced,
)
from shoal.large.memory import give_back_freed_memory, keep_freed_memory
from shoal.large.on_disk import keep_blocks_on_disk, place_blocks
from shoal.models import modeling_shoal
from shoal.models.structure import find_stacks, holds_own_modules, is_causal, is_encoder


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
    torch_dtype = read_dtype(dtype, device)
    if device.type == "cpu":
        give_back_freed_memory() if streamed else keep_freed_memory()
    folder, extra = locate(name, revision)
    try:
        if streamed and "gguf_file" in extra:
            raise ValueError("a GGUF file cannot be streamed; convert it to safetensors first")
        config = read_config_at(folder, extra)
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
        raise ValueError(f"cannot load model {name!r}: {explain(error)}") from error
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
    if is_own(config):
        if streamed_to is not None:
            raise ValueError("it holds linear blocks, which are not streamed; load it as a whole")
        assert config.architectures  # `find_shoal_class` has looked
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


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with model `name`."""
    folder, extra = locate(name, revision)
    extra.pop("quantization_config", None)
    try:
        if "gguf_file" not in extra:
            refuse_adapter(folder, revision)
        if find_shoal_class(folder, extra):
            # With the configuration given, nothing asks whether to run the folder's code.
            extra["config"] = read_config_at(folder, extra)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"cannot load the tokenizer of {name!r}: {explain(error)}") from error


def check_model(name: str, *, revision: str | None = None) -> None:
    """What can be told of a model in a moment, without its weights. Raises ValueError if it cannot be loaded."""
    load_tokenizer(name, revision=revision)
    folder, extra = locate(name, revision)
    extra.pop("quantization_config", None)
    try:
        config = read_config_at(folder, extra)
        _refuse_encoders(config)
        refuse_side_channels(config)
        ask_for_dequantised(config)
        for file in Path(folder).glob("*.safetensors"):
            safe_open(file, framework="pt").keys()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"cannot load model {name!r}: {explain(error)}") from error


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
