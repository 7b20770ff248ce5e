"""Linear maps between the blocks of a Hugging Face causal language model, and factored projections inside them.

A model whose replaced blocks became linear maps is a stock model with fewer blocks, plus a `LinearBlock` after (or
before the first of) some of them; a `FactoredLinear` stands for a projection of low rank, an `Absent` for an attention or
an MLP that is gone. The stock part keeps its own code, caches and masks. This file alone is needed to load such a model: it
is copied into the model's folder for `trust_remote_code=True`, and depends on torch and transformers only.

The configuration names them: `linear_blocks = [{"block": 10, "where": "after", "replaces": [11, 12], "rank": null}]`,
`factored_projections = {"model.layers.0.mlp.up_proj": 296}` (the rank), and the attentions and MLPs that are gone,
`absent_modules = {"model.layers.3.self_attn": 2}` (the length of the tuple that it returned).
"""

from collections import OrderedDict
from itertools import takewhile

import torch
import transformers
from torch import nn

PREFIX = "Shoal"
OWN_MODULES = ("linear_blocks", "factored_projections", "absent_modules")


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


class Absent(nn.Module):
    """Stands where an attention or an MLP stood, and adds nothing to the stream.

    `num_outputs` is the length of the tuple that is expected of it, None for a tensor. With `layer_idx`, the cache goes on
    counting tokens in this layer, at one number each for keys and values: other layers may ask it for their positions.
    """

    def __init__(self, num_outputs: int | None, layer_idx: int | None = None):
        super().__init__()
        self.num_outputs, self.layer_idx = num_outputs, layer_idx

    def forward(self, *args, **kwargs):
        stream = args[0] if args else kwargs["hidden_states"]
        if self.layer_idx is not None:
            count = stream.new_zeros(stream.shape[0], 1, stream.shape[1], 1)
            for cache in (value for value in (*args, *kwargs.values()) if isinstance(value, transformers.Cache)):
                cache.update(count, count, self.layer_idx)
        nothing = torch.zeros_like(stream)
        return nothing if self.num_outputs is None else (nothing, *[None] * (self.num_outputs - 1))


def remove(model: nn.Module, name: str, num_outputs: int | None) -> None:
    """Takes the attention or MLP of that name out of the model."""
    layer_idx = getattr(model.get_submodule(name), "layer_idx", None)
    model.set_submodule(name, Absent(num_outputs, layer_idx))


class FactoredLinear(nn.Sequential):
    """A projection of rank `rank`: `down` to that width, then `up`."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool):
        down, up = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=bias)
        super().__init__(OrderedDict(down=down, up=up))
        self.down: nn.Linear
        self.up: nn.Linear


def factor(model: nn.Module, name: str, rank: int) -> FactoredLinear:
    """Puts factors, to be filled, in the place of the projection of that name (a `Linear` or GPT-2's `Conv1D`)."""
    projection = model.get_submodule(name)
    weight: torch.Tensor = projection.weight  # type: ignore[assignment]
    in_features, out_features = reversed(weight.shape) if isinstance(projection, nn.Linear) else weight.shape
    factored = FactoredLinear(in_features, out_features, rank, projection.bias is not None)
    factored.to(device=weight.device, dtype=weight.dtype)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, factored)
    return factored


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


def text_config(model: transformers.PreTrainedModel):
    """The configuration of the blocks' text: the model's own, or its text part in a multimodal model."""
    return model.config if model.config.is_encoder_decoder else model.config.get_text_config(decoder=True)


def list_blocks(model: nn.Module, depth: int | None, beside: nn.Module | None = None) -> nn.ModuleList | None:
    """The list of `depth` (or any number of) modules of one class with weights; None if there is none.

    Of several the one nearest to the module `beside`, and of those the outermost.
    """
    names = {part: name.split(".") for name, part in model.named_modules()}
    lists = [
        part
        for part in names
        if isinstance(part, nn.ModuleList)
        and depth in (None, len(part))
        and len({type(block) for block in part}) == 1
        and any(weight.dim() > 1 for weight in part[0].parameters())
    ]
    path = names.get(beside, [])

    def nearness(part: nn.Module) -> int:
        return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(names[part], path, strict=False))))

    return max(lists, key=nearness, default=None)


def list_first_blocks(model: transformers.PreTrainedModel) -> nn.ModuleList | None:
    """The blocks of a decoder, of an encoder, or of an encoder-decoder's encoder; None if there is no list of them."""
    if model.config.is_encoder_decoder:
        return list_blocks(model.get_encoder(), None)
    # A model that sees or hears has stacks for that too, which may be as deep: the text's is beside its embeddings.
    return list_blocks(model, text_config(model).num_hidden_layers, beside=model.get_input_embeddings())


def attach_empty(model: transformers.PreTrainedModel) -> None:
    """Attaches the maps and factors that the configuration names, for weights to be loaded into."""
    config, blocks = text_config(model), list_first_blocks(model)
    assert blocks is not None
    for name, num_outputs in (getattr(config, "absent_modules", None) or {}).items():
        remove(model, name, num_outputs)
    for entry in getattr(config, "linear_blocks", None) or ():
        attach(blocks[entry["block"]], LinearBlock(config.hidden_size, entry["rank"]), entry["where"])
    for name, rank in (getattr(config, "factored_projections", None) or {}).items():
        factor(model, name, rank)


def _make_config_class(name: str) -> type:
    base = getattr(transformers, name.removeprefix(PREFIX))
    return type(name, (base,), {"model_type": f"shoal-{base.model_type}", "__module__": __name__})


def _make_model_class(name: str) -> type:
    base = getattr(transformers, name.removeprefix(PREFIX))

    def __init__(self, config, *args, **kwargs):
        base.__init__(self, config, *args, **kwargs)
        attach_empty(self)
        self.post_init()

    config_class = __getattr__(f"{PREFIX}{base.config_class.__name__}")
    members = {"__init__": __init__, "config_class": config_class, "__module__": __name__}
    # Of code that is not its own, transformers leaves buffers that no checkpoint holds as they come (Falcon-H1's scales).
    return type(name, (base,), {**members, "is_custom_code": classmethod(lambda _class: False)})


def __getattr__(name: str) -> type:
    """`ShoalLlamaForCausalLM` is `LlamaForCausalLM` with maps and factors; so for every causal model of transformers."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    make = _make_config_class if name.endswith("Config") else _make_model_class
    globals()[name] = make(name)
    return globals()[name]
