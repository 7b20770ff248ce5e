"""Attention and MLP of a block apart: their names, running them, and models without them."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_ids, make_model, make_tokenizer, random_map, same_with_and_without_cache
from hypothesis import given
from hypothesis import strategies as st
from shoal.checkpoints.load import load_model
from shoal.checkpoints.store import save
from shoal.models.calls import embed, record_calls
from shoal.models.structure import find_blocks, watch_boundaries
from shoal.recipe import Recipe
from shoal.replace.in_order import fit_in_order
from shoal.replace.maps import Replacement, apply_replacement
from shoal.replace.unit_stack import UnitStack, find_parts
from shoal.units import find_runs, list_places, name_units, read_unit

# Side by side, without modules of their own, or with the stream added inside.
NOT_APART = {"gpt_neox", "gptj", "falcon", "phi", "cohere", "opt", "bloom"}


@given(st.sets(st.integers(0, 20)))
def test_names_and_places_are_the_same_units(places):
    names = name_units(places)
    assert list_places(names) == sorted(places)
    assert [read_unit(str(name)) for name in names] == list(names)
    assert [place for run in find_runs(places) for place in run] == sorted(places)


@pytest.mark.parametrize("name", ["12.attn", "-1", "12.", "x", "1.5", True, None])
def test_what_is_no_unit_is_refused(name):
    with pytest.raises(ValueError, match=r"give its index, as 12, or a part of it"):
        read_unit(name)


def test_parts_one_after_the_other_are_the_block(model):
    """Or the family has none that stand so: then they are known to be none."""
    ids = make_ids(2, 16)
    parts = find_parts(model, ids)
    if model.config.model_type in NOT_APART:
        assert not any(parts)
        return
    assert all(parts)
    stack, boundaries = UnitStack(find_blocks(model), record_calls(model, ids), parts), list[torch.Tensor]()
    with torch.no_grad(), watch_boundaries(model, lambda _boundary, stream: boundaries.append(stream)):
        model(input_ids=ids)
    with torch.no_grad():
        stream = [embed(model, ids)]
        for place in range(2 * len(boundaries) - 2):
            torch.testing.assert_close(stack.run(0, place, [embed(model, ids)]), stream, rtol=1e-4, atol=1e-4)
            stream = stack.run(place, place + 1, stream)
    torch.testing.assert_close(stream[0], boundaries[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "units", [("1.mlp",), ("0.attention",), ("1.mlp", 2, "3.attention"), ("0.mlp", "1.attention", "3.attention", "3.mlp")]
)
def test_models_without_parts_answer_the_same_with_a_cache_and_from_a_folder(model, units, tmp_path):
    if not all(find_parts(model, make_ids(1, 8))):
        with pytest.raises(ValueError, match="name the whole block"):
            apply_replacement(model, Replacement(tuple(units)))
        return
    boundaries = [(run.start + 1) // 2 for run in find_runs(list_places(units))]
    apply_replacement(model, Replacement(tuple(units), {boundary: random_map(boundary) for boundary in boundaries}))
    ids = make_ids(2, 9)
    assert same_with_and_without_cache(model, ids)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    save(model, make_tokenizer(), tmp_path / "out", recipe=Recipe(base_model="tiny", num_replaced=1))
    loaded = load_model(str(tmp_path / "out"), dtype="float32", device=torch.device("cpu"), any_kind=True)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_parts_that_do_nothing_leave_without_a_trace(llama, windows):
    with torch.no_grad():
        find_blocks(llama)[1].self_attn.o_proj.weight.zero_()
        find_blocks(llama)[3].mlp.down_proj.weight.zero_()
    ids, student = make_ids(2, 16, seed=5), copy.deepcopy(llama)
    apply_replacement(student, fit_in_order(llama, ("1.attention", "3.mlp"), windows.take(0, 16), kind="dropped"))
    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=ids).logits, llama(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_an_affine_run_that_begins_and_ends_inside_blocks_is_recovered(llama, windows):
    """An MLP, a block and an attention that together are one affine map."""
    units = ("1.mlp", "2", "3.attention")
    with torch.no_grad():
        find_blocks(llama)[1].mlp.down_proj.weight.zero_()
        find_blocks(llama)[3].self_attn.o_proj.weight.zero_()
    turn = torch.eye(32) + torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 8
    find_blocks(llama)[2].forward = lambda hidden_states, **_: hidden_states @ turn
    with pytest.raises(ValueError, match="block 2 has no attention"):
        fit_in_order(llama, ("2.mlp",), windows.take(0, 16))
    replacement = fit_in_order(llama, tuple(map(read_unit, units)), windows, refit_outputs=False)
    assert list(replacement.maps) == [2]
    student, ids = copy.deepcopy(llama), make_ids(2, 16, seed=5)
    apply_replacement(student, replacement)
    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=ids).logits, llama(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


def test_an_attention_that_is_gone_takes_its_cache_with_it():
    model = make_model("llama")
    apply_replacement(model, Replacement(("1.attention", "2.mlp")))
    cache = model(input_ids=make_ids(1, 9), use_cache=True).past_key_values
    assert [layer.keys.shape[-1] * layer.keys.shape[1] for layer in cache.layers] == [16, 1, 16, 16, 16]
