"""Replacements keep the laws: nothing replaced is the same model, maps sit where blocks sat, folders load alike."""

from __future__ import annotations

import copy

import pytest
import shoal
import torch
import transformers
from conftest import make_ids, make_tokenizer, random_map, same_with_and_without_cache
from shoal.checkpoints.store import save
from shoal.models.structure import find_blocks, name_cache_argument, watch_boundaries
from shoal.recipe import KINDS, Recipe
from shoal.replace.in_order import fit_in_order
from shoal.replace.maps import Replacement, apply_replacement, linear_blocks
from shoal.units import find_runs


def test_runs():
    assert find_runs([13, 5, 12, 0]) == [range(1), range(5, 6), range(12, 14)]
    assert find_runs([]) == []


def test_replacing_nothing_keeps_the_logits(model):
    ids = make_ids(2, 16)
    same = copy.deepcopy(model)
    apply_replacement(same, Replacement(()))
    with torch.no_grad():
        assert torch.equal(same(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("blocks", [(0,), (1, 2), (0, 3, 4)])
def test_maps_stand_where_the_blocks_stood(model, blocks):
    """The student's last boundary equals running kept blocks and maps by hand; replaced blocks hold no KV cache."""
    ids = make_ids(2, 16)
    maps = {run.start: random_map(run.start) for run in find_runs(blocks)}
    student = copy.deepcopy(model)
    apply_replacement(student, Replacement(blocks, maps=maps))
    expected = run_by_hand(model, ids, blocks, maps)
    boundaries = []
    with torch.no_grad(), watch_boundaries(student, lambda _boundary, stream: boundaries.append(stream)):
        cache = getattr(student(input_ids=ids, use_cache=True), name_cache_argument(student))
    torch.testing.assert_close(boundaries[-1], expected, rtol=1e-4, atol=1e-4)
    assert len(cache.layers) == 5 - len(blocks)
    assert same_with_and_without_cache(student, ids)


@torch.no_grad()
def run_by_hand(model, ids, blocks, maps):
    from shoal.models.calls import embed, record_calls

    calls = record_calls(model, ids)
    stream = embed(model, ids)
    for index, block in enumerate(find_blocks(model)):
        if index in maps:
            stream = maps[index](stream.flatten(0, 1)).view_as(stream)
        if index not in blocks:
            stream = calls[index].run(block, stream)
    return stream


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_generates_and_loads_alike(model, kind, windows, tmp_path):
    """With and without KV cache the same tokens; stock, trust_remote_code and shoal.load give the same logits."""
    if kind == "folded" and type(model).__name__ in ("Gemma2ForCausalLM", "Gemma3ForCausalLM"):
        pytest.skip("a norm follows the MLP: nothing to fold into")
    rank = 4 if kind == "low_rank" else None
    replacement = fit_in_order(model, (1, 3), windows, kind=kind, rank=rank)
    student = copy.deepcopy(model)
    apply_replacement(student, replacement)
    assert len(linear_blocks(student)) == (2 if kind in ("linear", "low_rank") else 0)
    ids = make_ids(2, 12)
    assert same_with_and_without_cache(student, ids)
    recipe = Recipe(base_model="tiny", num_replaced=2, blocks=(1, 3), kind=kind, rank=rank, selection="listed")
    save(student, make_tokenizer(), tmp_path / "out", recipe=recipe)
    remote = kind in ("linear", "low_rank")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=remote)
    with torch.no_grad():
        logits = student(input_ids=ids).logits
        assert torch.equal(reloaded(input_ids=ids).logits, logits)
        assert torch.equal(shoal.load(tmp_path / "out", dtype="float32")(input_ids=ids).logits, logits)
    if remote:  # without trust, the maps must not get lost silently
        with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_a_replacement_survives_its_file(tmp_path):
    maps, weights = {1: random_map(1), 3: random_map(3, rank=4)}, {2: {"mlp.down_proj.weight": torch.randn(32, 48)}}
    replacement = Replacement((1, 3, "4.mlp"), maps, weights)
    replacement.save(tmp_path / "fit.safetensors")
    loaded = Replacement.load(tmp_path / "fit.safetensors")
    assert loaded.units == (1, 3, "4.mlp")
    assert loaded.blocks == (1, 3)
    x = torch.randn(7, 32)
    for block in (1, 3):
        assert torch.equal(loaded.maps[block](x), replacement.maps[block](x))
    torch.testing.assert_close(loaded.weights, weights, rtol=0, atol=0)


def test_a_model_with_maps_is_not_compressed_twice(llama):
    apply_replacement(llama, Replacement((1,), maps={1: random_map(1)}))
    with pytest.raises(ValueError, match="dense model"):
        apply_replacement(llama, Replacement((1,), maps={1: random_map(1)}))
