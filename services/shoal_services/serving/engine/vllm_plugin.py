"""vLLM learns the linear kinds: a stock architecture of its own, plus the maps between the blocks.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`), so `vllm serve FOLDER` works wherever
Shoal is installed beside it. Nothing of the folder's code is run.
"""

from __future__ import annotations

from typing import Any

from shoal.models import modeling_shoal
from shoal.models.modeling_shoal import PREFIX, LinearBlock, list_blocks
from torch import Tensor


def register() -> None:
    """Tells vLLM of `shoal-llama` and its like: every architecture that both it and transformers have."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    for model_type, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        name = f"{PREFIX}{architecture}"
        if architecture in known and name not in known:
            ModelRegistry.register_model(name, f"{__name__}:{name}")
            config_class = getattr(modeling_shoal, f"{PREFIX}{CONFIG_MAPPING_NAMES[model_type]}")
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def __getattr__(name: str) -> type:
    """`ShoalLlamaForCausalLM`, made from vLLM's `LlamaForCausalLM`."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm import ModelRegistry

    base: Any = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        attach_maps(self, vllm_config.model_config.hf_text_config, vllm_config.model_config.dtype)

    globals()[name] = type(name, (base,), {"__init__": __init__, "__module__": __name__})
    return globals()[name]


def refuse_modules(config: Any) -> None:
    """Raises ValueError for a model with factored projections, or without attentions or MLPs in some of its blocks."""
    if getattr(config, "absent_modules", None):
        raise ValueError(
            "vLLM cannot serve a model whose blocks lack an attention or an MLP: it plans its cache for all of them; "
            "say engine: transformers"
        )
    if getattr(config, "factored_projections", None):
        raise ValueError(
            "vLLM cannot serve a model made with weight_share: it fuses query, key and value into one projection, which "
            "has no factors; say engine: transformers"
        )


def attach_maps(model: Any, config: Any, dtype: Any) -> None:
    """Puts the maps that the configuration names into vLLM's blocks, under the names that their weights have.

    Raises ValueError as `refuse_modules`.
    """
    refuse_modules(config)
    text_model = model.get_language_model() if hasattr(model, "get_language_model") else model
    blocks = list_blocks(text_model, config.num_hidden_layers)
    assert blocks is not None
    for entry in getattr(config, "linear_blocks", None) or ():
        block, where = blocks[entry["block"]], entry["where"]
        block.add_module(f"linear_{where}", LinearBlock(config.hidden_size, entry["rank"]).to(dtype))
        if where == "after":
            block.register_forward_hook(_map_after)
        else:
            block.register_forward_pre_hook(_map_before)


def _map_after(block: Any, _arguments: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        hidden_states, residual, *rest = output
        return (_map(block.linear_after, hidden_states, residual), residual, *rest)
    return block.linear_after(output)


def _map_before(block: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """vLLM's blocks take (positions, hidden_states, residual), those that keep no residual beside (hidden_states, …)."""
    if arguments[0].is_floating_point():
        return block.linear_before(arguments[0]), *arguments[1:]
    positions, hidden_states, residual = arguments
    return positions, _map(block.linear_before, hidden_states, residual), residual


def _map(linear: LinearBlock, hidden_states: Tensor, residual: Tensor | None) -> Tensor:
    """vLLM carries the residual stream as a sum of two tensors; the map's update goes to the first."""
    stream = hidden_states if residual is None else hidden_states + residual
    return hidden_states + linear.update(stream)
