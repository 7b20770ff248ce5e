"""Wanda keeps exactly what it says, nothing of it is chance, and it beats magnitudes where inputs differ in size."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_ids, make_model
from shoal.checkpoints.hashes import hash_weights
from shoal.models.projections import find_projections, weight_of
from shoal.models.structure import find_blocks
from shoal.replace.maps import AffineMap, Replacement, apply_replacement
from shoal.text.windows import TokenWindows
from shoal.thin.projections import walk_projections, watch_inputs
from shoal.thin.sparsify import choose_kept, sparsify
from transformers import MixtralConfig, MixtralForCausalLM

WINDOWS = TokenWindows(make_ids(8, 16), "train")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=make_ids(2, 16, seed=5)).logits


def zeros_of(weight_oi: torch.Tensor, group: int) -> torch.Tensor:
    """Zeros in each group of neighbours [rows, groups]."""
    return (weight_oi == 0).view(len(weight_oi), -1, group).sum(-1)


def test_every_row_loses_exactly_the_share(model, share=0.3):
    """In every family, and nothing else changes."""
    dense = copy.deepcopy(model)
    sparsify(model, WINDOWS, share)
    projections = find_projections(model)
    for name, module in projections.items():
        weight, before = weight_of(module), weight_of(dense.get_submodule(name))
        width = weight.shape[1]
        assert (zeros_of(weight, width) == round(share * width)).all(), name
        assert torch.equal(weight, before * (weight != 0)), name
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in projections:
            assert torch.equal(parameter, dense.get_parameter(name)), name


@pytest.mark.parametrize(("pattern", "group"), [("2:4", 4), ("4:8", 8)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_group_loses_exactly_half(family, pattern, group):
    model = make_model(family)
    sparsify(model, WINDOWS, pattern)
    for module in find_projections(model).values():
        assert (zeros_of(weight_of(module), group) == group // 2).all()


def test_a_share_of_zero_changes_nothing(llama):
    before = logits(llama)
    sparsify(llama, WINDOWS, 0.0)
    assert torch.equal(logits(llama), before)


@pytest.mark.parametrize("sparsity", [0.5, "2:4", "4:8"])
def test_with_inputs_of_one_norm_it_is_magnitude_pruning(sparsity):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    kept = choose_kept(weight.abs() * torch.full((32,), 3.0), sparsity)
    assert torch.equal(kept, choose_kept(weight.abs(), sparsity))
    group = 32 if sparsity == 0.5 else int(sparsity[2:])
    magnitudes = weight.abs().view(16, -1, group)
    stays = kept.view(16, -1, group)
    assert (magnitudes.masked_fill(~stays, torch.inf).amin(-1) >= magnitudes.masked_fill(stays, 0).amax(-1)).all()


def test_a_silent_input_goes_first(llama):
    """Large weights on a feature that is never on are of no importance."""
    block = find_blocks(llama)[0]
    with torch.no_grad():
        block.input_layernorm.weight[3] = 0
        block.self_attn.q_proj.weight[:, 3] = 100
    before = logits(llama)
    sparsify(llama, WINDOWS, 1 / 32)
    assert (block.self_attn.q_proj.weight[:, 3] == 0).all()
    assert torch.allclose(logits(llama), before, atol=0.5 * float(before.abs().max()))


def test_equal_weights_and_inputs_still_lose_the_exact_share():
    assert (choose_kept(torch.ones(4, 10), 0.3).sum(1) == 7).all()
    assert (choose_kept(torch.zeros(4, 8), "2:4").view(4, 2, 4).sum(-1) == 2).all()


def test_it_loses_less_of_the_outputs_than_magnitudes(llama):
    """Per projection, where the features' norms differ; the criterion is made for that."""
    with torch.no_grad():
        for block in find_blocks(llama):
            block.input_layernorm.weight.copy_(torch.logspace(-1.5, 1.5, 32))
    wanda, magnitude = copy.deepcopy(llama), copy.deepcopy(llama)
    sparsify(wanda, WINDOWS, 0.5)
    for module in find_projections(magnitude).values():
        module.weight.data.mul_(choose_kept(module.weight.data.abs(), 0.5))
    aim = logits(llama)
    assert (logits(wanda) - aim).norm() < (logits(magnitude) - aim).norm()


def test_each_block_sees_the_pruned_ones_before_it(llama):
    """The second block's mask is that of its inputs after the pruned first block, and not after the dense one."""
    pruned = copy.deepcopy(llama)
    sparsify(pruned, WINDOWS, 0.6)
    first = copy.deepcopy(llama)
    find_blocks(first)[0].load_state_dict(find_blocks(pruned)[0].state_dict())
    squares = list(walk_projections(first, WINDOWS, lambda x: x.square().sum(0)))[1]
    for name, squares_i in squares.items():
        weight = llama.get_submodule(name).weight
        kept = choose_kept(weight.abs() * squares_i.sqrt().float(), 0.6)
        assert torch.equal(pruned.get_submodule(name).weight != 0, kept), name


def test_sums_are_those_of_one_pass(llama):
    with torch.no_grad(), watch_inputs(find_projections(llama)) as found:
        llama(input_ids=WINDOWS.ids)
    walked = {name: s for sums in walk_projections(llama, WINDOWS, lambda x: x.T @ x) for name, s in sums.items()}
    assert walked.keys() == found.keys() == find_projections(llama).keys()
    for name, x in ((name, inputs.flatten(0, 1)) for name, inputs in found.items()):
        torch.testing.assert_close(walked[name].float(), x.T @ x, rtol=1e-3, atol=1e-3)


def test_maps_are_left_whole(llama):
    maps = {block: AffineMap(torch.randn(32, 32) / 32, torch.ones(32)) for block in (0, 2)}
    apply_replacement(llama, Replacement((0, 2), maps))
    sparsify(llama, WINDOWS, "2:4")
    linear = [module.update.weight for name, module in llama.named_modules() if name.endswith(("_after", "_before"))]
    assert len(linear) == 2
    assert all((weight != 0).all() for weight in linear)
    assert all((module.weight == 0).float().mean() == 0.5 for module in find_projections(llama).values())


def test_the_same_text_gives_the_same_zeros():
    models = [make_model("llama") for _ in range(2)]
    for model in models:
        sparsify(model, WINDOWS, 0.5)
    assert hash_weights(models[0]) == hash_weights(models[1])


def test_progress_counts_blocks(llama):
    heard: list[int] = []
    sparsify(llama, WINDOWS, 0.5, on_progress=heard.append)
    assert heard == [1, 2, 3, 4, 5]


def test_rows_that_groups_do_not_fill_are_refused():
    with pytest.raises(ValueError, match=r"sparsity='4:8'.*_proj has 36 inputs, no multiple of 8; give a share"):
        sparsify(make_odd_llama(), WINDOWS, "4:8")


def make_odd_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4
    ))  # fmt: skip


def test_experts_are_refused():
    config = MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    before = copy.deepcopy(model := MixtralForCausalLM(config).eval())
    with pytest.raises(ValueError, match=r"mixture of experts.*need blocks of plain linear layers"):
        sparsify(model, WINDOWS, 0.5)
    assert hash_weights(model) == hash_weights(before)
