"""What a projection's output is multiplied by on its way into the stream is found by trying, and fitted with."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import COMMON, make_ids
from shoal.models.calls import embed, record_calls
from shoal.models.projections import find_down_proj
from shoal.models.structure import find_blocks
from shoal.replace.in_order import fit_in_order
from shoal.replace.maps import apply_replacement
from shoal.replace.refit import find_gain

EXPERTS = {"num_experts_per_tok": 2, "shared_expert_intermediate_size": 40, "shared_intermediate_size": 40}
OTHERS = {
    "granite": ({"residual_multiplier": 0.25}, 0.25),
    "granitemoeshared": ({"residual_multiplier": 0.25, "num_local_experts": 4, **EXPERTS}, 0.25),
    "qwen2_moe": ({"num_experts": 4, "moe_intermediate_size": 24, **EXPERTS}, None),  # a gate for every token
    "mixtral": ({"num_local_experts": 4}, None),
    "olmo2": ({}, None),  # a norm between the projection and the sum
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False}, None),  # a norm after the sum
    "cohere": ({}, 1.0),  # attention and MLP side by side
}


def make(family: str, **arguments) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **COMMON, **arguments)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in find_blocks(model).parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)
    return model


def gain_of(model: transformers.PreTrainedModel, block: int = 2) -> float | None:
    ids, module = make_ids(2, 12), find_blocks(model)[block]
    projection = find_down_proj(module, 32)
    return projection and find_gain(module, projection, record_calls(model, ids)[block], embed(model, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_most_families_add_it_as_it_is(model, dtype):
    expected = None if model.config.model_type in ("gemma2", "gemma3", "gemma3_text") else 1.0
    assert gain_of(model.to(dtype)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", OTHERS)
def test_other_families_multiply_or_do_not_add_it(family, dtype):
    arguments, expected = OTHERS[family]
    found = gain_of(make(family, **arguments).to(dtype))
    assert found == (expected and pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-3))


@pytest.mark.parametrize("kind", ["linear", "folded"])
def test_one_function_is_fitted_alike_however_it_is_written(windows, kind):
    """Granite's multiplier in the configuration, and the same in the weights of a model without one."""
    given = make("granite", residual_multiplier=0.25)
    merged, ids = make("granite", residual_multiplier=1.0), make_ids(2, 16, seed=3)
    with torch.no_grad():
        for block in find_blocks(merged):
            block.self_attn.o_proj.weight.mul_(0.25)
            block.mlp.down_proj.weight.mul_(0.25)
    results = []
    for model in (given, merged):
        replacement = fit_in_order(model, (1, 2), windows.take(0, 32), kind=kind, ridge=1e-3)
        assert replacement.weights
        student = copy.deepcopy(model)
        apply_replacement(student, replacement)
        with torch.no_grad():
            results.append((model(input_ids=ids).logits, student(input_ids=ids).logits))
    (dense, found), (same, expected) = results
    torch.testing.assert_close(dense, same)
    assert float((found - dense).abs().max()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
