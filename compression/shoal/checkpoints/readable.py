"""What a checkpoint's files hold that would be ignored, or taken for weights, in silence: refused by name.

Adapters beside or instead of a model; quantised weights, unless transformers dequantises them; tensors that belong to the
model's modules and for which it has no place. Left out without a word is what a causal model does not need: other heads,
vision towers, blocks that predict further tokens (MTP), and buffers that are computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from shoal.models.structure import find_blocks, text_config

# Methods whose weights transformers turns back into numbers while it loads them.
DEQUANTISED = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
COMPUTED = re.compile(
    r"(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids|(cos|sin)_cached|embed_positions\.weights"
    r"|num_batches_tracked|_extra_state|_float_tensor|version)$"
)
OF_ADAPTERS = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save|prompt_encoder|ia3_l)(\.|$)")
OF_QUANTISATION = re.compile(
    r"(^|[._])(scales?|scale_inv|scale_2|qweight|qzeros|zeros|zero_point|g_idx|absmax|quant_map|quant_state|SCB|weight_format"
    r"|weight_packed|weight_shape|biases|codebooks?)(\.|$)"
)
# What a dequantised weight has no use for: how the layer's inputs and its cache were rounded.
OF_ACTIVATIONS = re.compile(r"(^|\.)((input|output|activation|[qkv])_(global_)?scale|[qkv]_proj\.output_scale)$")
REMEDY = "take the model as it was before, or dequantise it and save it"
# How many blocks beyond the last there are that predict further tokens; transformers loads none of them.
NEXT_TOKEN_BLOCKS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers")


def refuse_adapter(place: str, revision: str | None = None) -> None:
    """Raises ValueError if the folder or Hub id holds a PEFT adapter, alone or beside a model."""
    file = find_adapter_config_file(place, revision=revision)
    if file is None:
        return
    adapter = json.loads(Path(file).read_text(encoding="utf-8"))
    base = adapter.get("base_model_name_or_path") or "BASE"
    beside = (Path(place) / "config.json").is_file()
    remedy = f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {place!r})"
    raise ValueError(
        f"it holds a PEFT adapter ({adapter.get('peft_type', '?')}) of {base!r}"
        + (" beside a model; merge it, or move adapter_config.json away: " if beside else ", and no model; merge it: ")
        + f"{remedy}.merge_and_unload().save_pretrained(FOLDER), and the tokenizer too"
    )


def ask_for_dequantised(config: PretrainedConfig) -> bool:
    """Whether the checkpoint is quantised; then the configuration is changed so that transformers undoes it on loading.

    Raises ValueError for a method that cannot be undone so.
    """
    parts = [config, config.get_text_config(decoder=True)]
    for name in ("quantization_config", "quantization", "compression_config"):
        settings = next((s for s in (getattr(part, name, None) for part in parts) if s), None)
        if settings is None:
            continue
        settings = settings if isinstance(settings, dict) else settings.to_dict()
        method = settings.get("quant_method", "unknown")
        if method not in DEQUANTISED or name != "quantization_config":
            raise ValueError(
                f"its weights are quantised ({name} in config.json: {method}), and maps cannot be fitted to them; {REMEDY} "
                "without that entry"
            )
        config.quantization_config = {**settings, "dequantize": True}
        return True
    return False


def forget_quantisation(model: PreTrainedModel) -> None:
    """Takes out of the configuration what is no longer so. Raises ValueError if weights are still quantised."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("its weights stay quantised on this machine; dequantise the model and save it first")
    for config in (model.config, text_config(model)):
        if hasattr(config, "quantization_config"):
            del config.quantization_config


def refuse_unplaced(model: PreTrainedModel, unexpected: Iterable[str], *, dequantised: bool = False) -> None:
    """Raises ValueError if a tensor of the files, for which the model has no place, changes what the model computes."""
    blocks, text = find_blocks(model), text_config(model)
    modules = {path: module for part in (model, model.base_model) for path, module in part.named_modules()}
    lists = "|".join(re.escape(path) for path, module in modules.items() if module is blocks)
    further = sum(getattr(text, name, None) or 0 for name in NEXT_TOKEN_BLOCKS)
    for key in sorted(key for key in unexpected if not COMPUTED.search(key)):
        if OF_ADAPTERS.search(key):
            raise ValueError(f"its weights hold an adapter ({key!r}); merge it into the model, and save that")
        block = re.match(rf"({lists})\.(\d+)\.", key)
        if block and int(block[2]) >= len(blocks):
            if int(block[2]) < len(blocks) + further:
                continue
            raise ValueError(f"its files hold a block {block[2]} ({key!r}), and its config.json says {len(blocks)} blocks")
        if not block and not _is_of_a_module(key, modules):
            continue
        if OF_QUANTISATION.search(key):
            if dequantised and OF_ACTIVATIONS.search(key):
                continue
            raise ValueError(
                f"its weights are quantised ({key!r} is no weight), and config.json does not say how; {REMEDY}"
            )
        raise ValueError(
            f"{type(model).__name__} has no place for {key!r}, and would leave it out; "
            "check that config.json belongs to these weights"
        )


def _is_of_a_module(key: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the tensor would be a module's own, and not of a part that the model lacks."""
    owner = key
    while owner and owner not in modules:
        owner = owner.rpartition(".")[0]
    is_leaf = owner != "" and next(modules[owner].children(), None) is None
    return is_leaf or (owner != "" and owner == key.rpartition(".")[0])


def refuse_packed(model: PreTrainedModel, place: str, revision: str | None = None) -> None:
    """Raises ValueError if a weight is kept in 8 bits or as integers, which mean nothing without their scales."""
    names = {_end(name) for name, _ in model.named_parameters()}
    for file in _find_weight_files(place, revision):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                dtype = tensors.get_slice(key).get_dtype()
                if dtype.startswith(("F8", "F4", "F6")) or (dtype[0] in "IU" and _end(key) in names):
                    raise ValueError(
                        f"its weights are quantised ({key!r} is {dtype}), and config.json does not say how; {REMEDY}"
                    )


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _find_weight_files(place: str, revision: str | None) -> list[str]:
    """The safetensors files of a folder, or of a Hub id that was loaded before; none for other formats."""
    index, single = (
        cached_file(
            place, name, revision=revision, local_files_only=True,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )
        for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    )  # fmt: skip
    if single:
        return [single]
    if not index:
        return []
    shards = set(json.loads(Path(index).read_text())["weight_map"].values())
    return [str(Path(index).parent / shard) for shard in sorted(shards)]
