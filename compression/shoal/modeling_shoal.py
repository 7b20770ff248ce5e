"""Linear maps between the blocks of a Hugging Face causal language model.

A model whose replaced blocks became linear maps is a stock model with fewer blocks, plus a `LinearBlock` after (or
before the first of) some of them. The stock part keeps its own code, caches and masks. This file alone is needed
to load such a model: it is copied into the model's folder for `trust_remote_code=True`, and depends on torch and
transformers only.

The configuration names the maps: `linear_blocks = [{"block": 10, "where": "after", "replaces": [11, 12], "rank": null}]`.
"""

import torch
import transformers
from torch import nn

PREFIX = "Shoal"


class LinearBlock(nn.Module):
    """x + W x + b on the residual stream: what stands where decoder blocks stood. W is d × d, or of rank `rank`."""

    def __init__(self, hidden_size: int, rank: int | None = None):
        super().__init__()
        if rank is None:
            self.update: nn.Module = nn.Linear(hidden_size, hidden_size)
        else:
            self.update = nn.Sequential(nn.Linear(hidden_size, rank, bias=False), nn.Linear(rank, hidden_size))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        return stream + self.update(stream)


def attach(block: nn.Module, linear: LinearBlock, where: str) -> None:
    """Puts a linear block right after or right before a decoder block, as `linear_after` or `linear_before` of it."""
    block.add_module(f"linear_{where}", linear)
    if where == "after":
        block.register_forward_hook(_run_after)
    else:
        block.register_forward_pre_hook(_run_before, with_kwargs=True)


def _run_after(block, _args, output):
    if isinstance(output, tuple):
        return (block.linear_after(output[0]), *output[1:])
    return block.linear_after(output)


def _run_before(block, args, kwargs):
    if args:
        return (block.linear_before(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": block.linear_before(kwargs["hidden_states"])}


def attach_empty(model: nn.Module, config) -> None:
    """Attaches the maps that the configuration names, for weights to be loaded into."""
    depth = config.num_hidden_layers
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    for entry in config.linear_blocks:
        attach(blocks[entry["block"]], LinearBlock(config.hidden_size, entry["rank"]), entry["where"])


def _make_config_class(name: str) -> type:
    base = getattr(transformers, name.removeprefix(PREFIX))
    return type(name, (base,), {"model_type": f"shoal-{base.model_type}", "__module__": __name__})


def _make_model_class(name: str) -> type:
    base = getattr(transformers, name.removeprefix(PREFIX))

    def __init__(self, config, *args, **kwargs):
        base.__init__(self, config, *args, **kwargs)
        attach_empty(self, config)
        self.post_init()

    config_class = __getattr__(f"{PREFIX}{base.config_class.__name__}")
    return type(name, (base,), {"__init__": __init__, "config_class": config_class, "__module__": __name__})


def __getattr__(name: str) -> type:
    """`ShoalLlamaForCausalLM` is `LlamaForCausalLM` with maps; so for every causal model of transformers."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    make = _make_config_class if name.endswith("Config") else _make_model_class
    globals()[name] = make(name)
    return globals()[name]
