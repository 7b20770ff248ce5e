"""What a model tells without its weights: its configuration, its skeleton, and whether memory would hold it."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from shoal.checkpoints.device import choose_device, read_dtype
from shoal.checkpoints.names import explain, locate
from shoal.checkpoints.readable import refuse_adapter
from shoal.large.memory import find_free_bytes
from shoal.models import modeling_shoal
from shoal.models.structure import is_causal


def read_config(name: str, *, revision: str | None = None) -> PretrainedConfig:
    """The model's configuration, without its weights. Raises ValueError if there is none."""
    folder, extra = locate(name, revision)
    try:
        return read_config_at(folder, extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"cannot read the configuration of {name!r}: {explain(error)}") from error


def read_config_at(folder: str, extra: dict) -> PretrainedConfig:
    """The same for what `locate` found; raises what transformers raises."""
    if "gguf_file" not in extra:
        refuse_adapter(folder, extra.get("revision"))
    arguments = {name: value for name, value in extra.items() if name != "quantization_config"}
    if class_name := find_shoal_class(folder, extra):
        return getattr(modeling_shoal, class_name).config_class.from_pretrained(folder, **arguments)
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, **arguments)


def find_shoal_class(folder: str, extra: dict) -> str | None:
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


def is_own(config: PretrainedConfig) -> bool:
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
        raise ValueError(f"cannot load model {name!r}: {explain(error)}") from error


def count_bytes(model: PreTrainedModel) -> int:
    """What the model's weights take, tied ones once."""
    return sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())


def is_memory_short(name: str, *, revision: str | None = None, dtype: str | None = None, num_copies: int = 1) -> bool:
    """Whether this machine's free memory would not hold that many copies of the model and its moments.

    False for models that cannot be streamed.
    """
    if name.endswith(".gguf"):
        return False
    config = read_config(name, revision=revision)
    if is_own(config) or not is_causal(config):
        return False
    device = choose_device()
    skeleton = make_skeleton(name, revision=revision, dtype=read_dtype(dtype, device))
    weights = count_bytes(skeleton)
    text = skeleton.config.get_text_config(decoder=True)
    # Four sets of two float64 matrices a block (see `shoal.linearity.moments`).
    return num_copies * weights + 64 * text.num_hidden_layers * text.hidden_size**2 > find_free_bytes(device)
