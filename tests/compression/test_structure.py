"""Blocks are found, watched, run alone and dropped in every family."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import make_ids, same_with_and_without_cache
from shoal.models.calls import embed, record_calls
from shoal.models.shorten import drop_blocks
from shoal.models.structure import find_blocks, text_config, watch_boundaries


def test_blocks_are_found(model):
    blocks = find_blocks(model)
    assert len(blocks) == 5
    assert sum(p.numel() for p in blocks.parameters()) > 5 * 32 * 32


def test_boundaries_are_the_hidden_states(model):
    ids, seen = make_ids(2, 16), {}
    with torch.no_grad(), watch_boundaries(model, seen.__setitem__):
        hidden_states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert sorted(seen) == list(range(6))
    for boundary in range(5):
        torch.testing.assert_close(seen[boundary], hidden_states[boundary])
    # The last hidden state is after the final norm: not the block's output.
    assert not torch.allclose(seen[5], hidden_states[5])


def test_running_recorded_calls_block_by_block_is_the_forward_pass(model):
    ids, seen = make_ids(2, 16), {}
    with torch.no_grad():
        with watch_boundaries(model, seen.__setitem__):
            model(input_ids=ids)
        calls = record_calls(model, make_ids(2, 16, seed=1))
        stream = embed(model, ids)
        torch.testing.assert_close(stream, seen[0])
        for index, block in enumerate(find_blocks(model)):
            stream = calls[index].run(block, stream)
            torch.testing.assert_close(stream, seen[index + 1])


def test_dropping_nothing_changes_nothing(model):
    ids = make_ids(2, 16)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        drop_blocks(model, [])
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)


def test_dropped_model_is_a_stock_model_of_fewer_blocks(model, tmp_path):
    """Cache indices and per-layer lists agree: it generates alike with and without cache, and after a reload."""
    ids = make_ids(2, 12)
    types = getattr(text_config(model), "layer_types", None)
    drop_blocks(model, [0, 2])
    if types:
        assert text_config(model).layer_types == [types[1], types[3], types[4]]
    model.save_pretrained(tmp_path)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(reloaded(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)
    assert same_with_and_without_cache(model, ids)


@pytest.mark.parametrize(("dropped", "message"), [([5], "blocks 0 to 4"), ([-1], "do not exist"), (range(5), "4 or fewer")])
def test_impossible_drops_are_refused(llama, dropped, message):
    with pytest.raises(ValueError, match=message):
        drop_blocks(llama, dropped)
    assert len(find_blocks(llama)) == 5


def test_model_without_decoder_stack_is_refused():
    config = transformers.AlbertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, embedding_size=8
    )
    with pytest.raises(ValueError, match="no list of 3 encoder blocks"):
        find_blocks(transformers.AlbertModel(config))
