"""What was written is what was measured: a folder is loaded as a stranger will load it, before anyone sees it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.checkpoints.config import read_config
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.large.memory import find_free_bytes
from shoal.large.on_disk import in_memory, is_on_disk, named_weights
from shoal.models import modeling_shoal
from shoal.models.calls import record_calls
from shoal.models.shorten import build_skeleton
from shoal.models.structure import find_blocks, holds_own_modules, text_config

NUM_TOKENS = 16
SAMPLE = "The sea is 12 °C, naïve — 漢字.\n"
# Kernels may round otherwise for weights that lie otherwise in memory; a wrong scale or a lost map is far above this.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 2e-2


@torch.no_grad()
def check_saved(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError, saying what differs, if the folder does not load as `model` and `tokenizer`.

    Weights are compared bit by bit, and logits on a few tokens. Of a model that would not fit into memory a second
    time, names and shapes of all weights and the output of one block.
    """
    _check_tokenizer(folder, tokenizer)
    if is_on_disk(model) or not _fits_again(model):
        _check_parts(folder, model)
        return
    dtype = str(model.dtype).removeprefix("torch.")
    loaded = load_model(str(folder), dtype=dtype, device=model.device, any_kind=True)
    written = dict(named_weights(loaded))
    _require_names(model, loaded)
    for name, read in named_weights(model):
        if not torch.equal(read(), written[name]()):
            raise _refuse(f"its weight {name!r} loads with other values")
    _require_alike("logits", _run(model), _run(loaded), model.dtype)


def _fits_again(model: PreTrainedModel) -> bool:
    return sum(p.nbytes for p in model.parameters()) < find_free_bytes(model.device)


def _run(model: PreTrainedModel) -> Tensor:
    """Logits, or the last hidden states of a model without a head, on tokens spread over the vocabulary."""
    vocabulary = text_config(model).vocab_size
    ids = (torch.arange(NUM_TOKENS, device=model.device) * 7919 % vocabulary)[None]
    arguments = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **arguments)[0].float()


def _check_parts(folder: Path, model: PreTrainedModel) -> None:
    if holds_own_modules(model):
        loaded = _load_middle(folder, type(model).__name__)
    else:
        loaded = load_model(str(folder), dtype=str(model.dtype).removeprefix("torch."), device=model.device, streamed=True)
    _require_names(model, loaded)
    ids = torch.arange(NUM_TOKENS, device=model.device)[None] % text_config(model).vocab_size
    blocks, rebuilt = find_blocks(model), find_blocks(loaded)
    middle = len(blocks) // 2
    call, generator = record_calls(model, ids)[middle], torch.Generator().manual_seed(0)
    stream = torch.randn(1, NUM_TOKENS, text_config(model).hidden_size, generator=generator)
    with in_memory(blocks[middle]), in_memory(rebuilt[middle]):
        ours, theirs = (call.run(b[middle], stream.to(model.device, model.dtype)).float() for b in (blocks, rebuilt))
    _require_alike(f"output of block {middle}", ours, theirs, model.dtype)


def _load_middle(folder: Path, class_name: str) -> PreTrainedModel:
    """A model with maps or factors, without weights but for its middle block's."""
    loaded = build_skeleton(getattr(modeling_shoal, f"Shoal{class_name}"), read_config(str(folder)))
    loaded.tie_weights()
    blocks = find_blocks(loaded)
    prefix = next(f"{path}.{len(blocks) // 2}." for path, part in loaded.named_modules() if part is blocks)
    weights: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            weights |= {k.removeprefix(prefix): opened.get_tensor(k) for k in opened.keys() if k.startswith(prefix)}  # noqa: SIM118
    blocks[len(blocks) // 2].load_state_dict(weights, assign=True)
    return loaded


def _require_names(model: PreTrainedModel, loaded: PreTrainedModel) -> None:
    shapes, found = ({name: tuple(p.shape) for name, p in one.named_parameters()} for one in (model, loaded))
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            raise _refuse(f"its weight {name!r} loads with shape {found.get(name)} instead of {shapes.get(name)}")


def _require_alike(what: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError if the second differs by more than the rounding of `dtype`; NaN is unlike everything."""
    error = float((theirs - ours).norm() / ours.norm())
    if not error <= TOLERANCES.get(dtype, HALF_TOLERANCE):
        raise _refuse(f"its {what} differ by {error:.2g} of their size from those of the model in memory")


def _check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load_tokenizer(str(folder))
    if loaded(SAMPLE)["input_ids"] != tokenizer(SAMPLE)["input_ids"]:
        raise _refuse("its tokenizer splits text otherwise than the one in memory")


def _refuse(why: str) -> ValueError:
    return ValueError(
        f"the model was not stored, since it would not load as it was measured: {why}; transformers does not save or load "
        "this family faithfully: please report the model's name"
    )
