"""Factors lose the tail of singular values and not more, fit their share, and load as they were saved."""

from __future__ import annotations

import copy
import json
from itertools import product

import pytest
import shoal
import torch
import transformers
from conftest import make_ids, make_model
from shoal.checkpoints.store import save
from shoal.models.modeling_shoal import FactoredLinear
from shoal.models.projections import find_projections, weight_of
from shoal.models.structure import find_blocks
from shoal.recipe import KINDS, Recipe
from shoal.replace.maps import AffineMap, Replacement, apply_replacement
from shoal.text.windows import TokenWindows
from shoal.thin.sparsify import sparsify
from shoal.thin.svd import choose_rank, factor_weights, find_root, truncate
from shoal_services.serving.engine.vllm_plugin import attach_maps

WINDOWS = TokenWindows(make_ids(8, 16), "train")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=make_ids(2, 16, seed=5)).logits


@pytest.mark.parametrize(("num_out", "num_in"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("rank", [1, 8, 23])
def test_the_loss_is_the_tail_of_singular_values(num_out, num_in, rank):
    weight, x = draw(num_out, num_in), draw(200, num_in, seed=1) @ draw(num_in, num_in, seed=2)
    up, down, loss = truncate(weight, x.T @ x, rank)
    lost = (x @ (weight - up @ down).T).square().sum()
    assert float(lost) == pytest.approx(loss, rel=1e-3), "but for the ridge"


def test_it_is_the_weight_that_inverting_the_whitening_gives():
    """SVD-LLM's own way: W' = U S Vᵀ L⁻¹."""
    weight, x = draw(24, 40), draw(200, 40, seed=1)
    gram = x.T @ x
    up, down, _ = truncate(weight, gram, 10)
    whitening = find_root(gram)
    torch.testing.assert_close(whitening @ whitening.T, gram)
    left, singular, right = torch.linalg.svd(weight @ whitening, full_matrices=False)
    theirs = (left[:, :10] * singular[:10]) @ right[:10] @ torch.linalg.inv(whitening)
    torch.testing.assert_close(up @ down, theirs)


def test_it_loses_less_than_the_plain_svd():
    weight, x = draw(24, 40), draw(200, 40, seed=1) * torch.logspace(-2, 2, 40)
    up, down, _ = truncate(weight, x.T @ x, 10)
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    plain = (left[:, :10] * singular[:10]) @ right[:10]
    assert (x @ (weight - up @ down).T).norm() < 0.5 * (x @ (weight - plain).T).norm()


def test_a_weight_of_that_rank_is_kept_exactly():
    weight, x = draw(24, 6) @ draw(6, 40, seed=3), draw(200, 40, seed=1)
    up, down, loss = truncate(weight, x.T @ x, 6)
    torch.testing.assert_close(up @ down, weight)
    assert loss < 1e-15 * float((x @ weight.T).square().sum())


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_few_tokens_leave_finite_factors(num_tokens):
    x = draw(num_tokens, 40, seed=1)
    up, down, _ = truncate(draw(24, 40), x.T @ x, 8)
    assert up.isfinite().all() and down.isfinite().all()
    assert (x @ (draw(24, 40) - up @ down).T).norm() < 1e-2, "three tokens are in a space of eight dimensions"


def test_a_broken_model_is_told():
    with pytest.raises(FloatingPointError, match="not finite: the model is broken"):
        find_root(torch.full((2, 2), torch.nan))


def test_a_projection_is_factored_where_that_saves_parameters():
    for num_out, num_in, share in product((16, 48, 192), (16, 48, 576), (0.2, 0.5, 0.8, 0.99)):
        rank = choose_rank(num_out, num_in, share)
        assert rank % 8 == 0
        assert rank * (num_out + num_in) <= share * num_out * num_in
        assert (rank + 8) * (num_out + num_in) > share * num_out * num_in, "and no larger rank would do"


def test_every_family_is_factored(model):
    dense = copy.deepcopy(model)
    factor_weights(model, WINDOWS, 0.9)
    ranks = model.config.get_text_config().factored_projections
    for name, module in find_projections(dense).items():
        assert (name in ranks) == (choose_rank(*weight_of(module).shape, 0.9) > 0)
        if name in ranks:
            factored = model.get_submodule(name)
            assert isinstance(factored, FactoredLinear)
            assert factored.down.out_features == ranks[name]
            assert sum(p.numel() for p in (factored.down.weight, factored.up.weight)) <= 0.9 * module.weight.numel()
    assert logits(model).isfinite().all()
    assert not torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_projections_of_low_rank_leave_the_logits(family):
    """Biases and weights stored the other way round included."""
    model = make_model(family)
    with torch.no_grad():
        for module in find_projections(model).values():
            left, right = torch.randn(len(module.weight), 8), torch.randn(8, module.weight.shape[1])
            module.weight.copy_(left @ right / 40)
            if module.bias is not None:
                module.bias.normal_(std=0.1)
    before = logits(model)
    factor_weights(model, WINDOWS, 0.9)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


def test_what_cannot_be_factored_is_refused(llama):
    with pytest.raises(ValueError, match=r"weight_share=0\.1 leaves no projection a rank of 8; give a larger share"):
        factor_weights(copy.deepcopy(llama), WINDOWS, 0.1)
    factor_weights(llama, WINDOWS, 0.9)
    with pytest.raises(ValueError, match="factored already; start from its dense model"):
        factor_weights(llama, WINDOWS, 0.9)
    with pytest.raises(ValueError, match="factored projections or gaps already; start from its dense model"):
        apply_replacement(llama, Replacement((2,)))


def test_vllm_is_told_that_it_cannot_serve_factors(llama):
    """Before it starts, and where its plugin would put maps into a model without factors."""
    factor_weights(llama, WINDOWS, 0.9)
    with pytest.raises(ValueError, match=r"vLLM cannot serve a model made with weight_share.*engine: transformers"):
        attach_maps(llama, llama.config, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [None, "2:4"])
@pytest.mark.parametrize("share", [None, 0.8])
def test_every_combination_loads_as_it_was(llama, tokenizer, tmp_path, kind, sparsity, share):
    """By `shoal.load`, and by transformers: with the folder's own code where the recipe says that it needs it."""
    maps = {"linear": draw(32, 32).float() / 32, "low_rank": (draw(32, 4).float() / 32, draw(4, 32).float())}
    replacement = Replacement((2,), {2: AffineMap(maps[kind], torch.ones(32))} if kind in maps else {})
    apply_replacement(llama, replacement)
    if share is not None:
        factor_weights(llama, WINDOWS, share)
    if sparsity is not None:
        sparsify(llama, WINDOWS, sparsity)
    recipe = Recipe(
        base_model="tiny", num_replaced=1, kind=kind, rank=4 if kind == "low_rank" else None,
        sparsity=sparsity, weight_share=share,
    )  # fmt: skip
    save(llama, tokenizer, tmp_path / "out", recipe=recipe)
    assert torch.equal(logits(shoal.load(tmp_path / "out", dtype="float32")), logits(llama))
    stock = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert stock == recipe.is_stock == (not (tmp_path / "out" / "modeling_shoal.py").exists())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=not stock)
    assert torch.equal(logits(theirs), logits(llama))
    assert len(find_blocks(theirs)) == 4
