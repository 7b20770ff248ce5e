"""What is left without some blocks is a stock model that loads as it was measured, or it is refused before the work."""

from __future__ import annotations

import copy

import pytest
import shoal
import torch
import transformers
from conftest import COMMON, GPT, MIXED, make_ids, make_model, make_tokenizer, random_map, same_with_and_without_cache
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shoal.checkpoints.store import save
from shoal.models.layer_settings import keep_layers
from shoal.models.shorten import drop_blocks, plan_shortening
from shoal.models.structure import find_blocks, text_config, watch_boundaries
from shoal.recipe import Recipe
from shoal.replace.in_order import fit_in_order
from shoal.replace.maps import AffineMap, Replacement, apply_replacement
from shoal.text.windows import TokenWindows

MOE = {**COMMON, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
MLA = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "kv_lora_rank": 16,
       "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4, "image_size": 28,
          "patch_size": 14}  # fmt: skip
GEMMA = {**COMMON, "head_dim": 8, "sliding_window": 8}


def make_nested():
    return transformers.Gemma3Config(text_config=GEMMA, vision_config=VISION, mm_tokens_per_image=4)


# Each says something of single layers in a way of its own.
ODD = {
    "counts: DeepSeek-V3": lambda: transformers.DeepseekV3Config(**{**MOE, **MLA}, first_k_dense_replace=2),
    "indices: Llama 4": lambda: transformers.Llama4TextConfig(
        **COMMON, intermediate_size_mlp=48, head_dim=8, num_local_experts=4, interleave_moe_layer_step=2,
        attention_chunk_size=8,
    ),
    "indices and types: Qwen2-MoE": lambda: transformers.Qwen2MoeConfig(
        **MOE, num_experts=4, shared_expert_intermediate_size=16, mlp_only_layers=[1, 2], use_sliding_window=True,
        sliding_window=8, max_window_layers=3,
    ),
    "patterns: GPT-Neo": lambda: transformers.GPTNeoConfig(
        vocab_size=128, hidden_size=32, num_layers=5, num_heads=4, max_position_embeddings=64, window_size=4,
        attention_types=[[["global", "local"], 2], [["global"], 1]], bos_token_id=1, eos_token_id=2,
    ),
    "scaled by depth: GPT-2": lambda: transformers.GPT2Config(**GPT, scale_attn_by_inverse_layer_idx=True),
    "scaled by depth: DiffLlama": lambda: transformers.DiffLlamaConfig(**COMMON),
    "buffers: Falcon-H1": lambda: transformers.FalconH1Config(
        **COMMON, mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64, mamba_n_groups=1, mamba_chunk_size=8,
        ssm_multipliers=[0.5, 0.25, 2.0, 0.7, 0.3],
    ),
    "a pattern of blocks: RecurrentGemma": lambda: transformers.RecurrentGemmaConfig(
        **{**COMMON, "num_hidden_layers": 5, "num_key_value_heads": 1}, lru_width=32, attention_window_size=16,
        block_types=["attention", "recurrent"],
    ),
    "numbers as keys: Gemma 4": lambda: transformers.Gemma4TextConfig(
        **GEMMA, hidden_size_per_layer_input=0, global_head_dim=16, layer_types=MIXED
    ),
    "nested, with a tower as deep: Gemma 3": make_nested,
}  # fmt: skip


@pytest.fixture(params=ODD)
def odd(request) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ODD[request.param]()).eval()
    with torch.no_grad():
        for block in find_blocks(model):
            for parameter in block.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6)
    return model


@pytest.mark.parametrize("kind", ["linear", "dropped"])
def test_odd_families_load_as_they_were_measured(odd, kind, tmp_path):
    student = copy.deepcopy(odd)
    maps = {1: random_map(1), 3: random_map(3)} if kind == "linear" else {}
    apply_replacement(student, Replacement((1, 3), maps=maps))
    assert len(find_blocks(student)) == text_config(student).num_hidden_layers == 3
    ids = make_ids(2, 12)
    assert same_with_and_without_cache(student, ids)
    recipe = Recipe(base_model="tiny", num_replaced=2, blocks=(1, 3), kind=kind, selection="listed")
    save(student, make_tokenizer(), tmp_path / "out", recipe=recipe)
    elsewhere = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=kind == "linear")
    with torch.no_grad():
        logits = student(input_ids=ids).logits
        for loaded in (shoal.load(tmp_path / "out", dtype="float32"), elsewhere):
            torch.testing.assert_close(loaded(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)


def test_blocks_that_scale_by_their_place_are_fitted_as_they_will_be(windows):
    """The last boundary of the student is what the walk saw: a refit toward it has nothing left to do."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT, scale_attn_by_inverse_layer_idx=True)).eval()
    for block in find_blocks(model):
        block.attn.c_attn.weight.data.mul_(30)
    fitted = fit_in_order(model, (1, 2), windows, kind="dropped")
    plain = Replacement((1, 2))
    errors = []
    for replacement in (fitted, plain):
        student = copy.deepcopy(model)
        apply_replacement(student, replacement)
        assert [block.attn.scaling for block in find_blocks(student)] == [8**-0.5 / place for place in (1, 2, 3)]
        errors.append(float((last_stream(student, windows) - last_stream(model, windows)).square().sum()))
    assert errors[0] < 0.9 * errors[1]


@torch.no_grad()
def last_stream(model, windows: TokenWindows) -> torch.Tensor:
    seen: dict[int, torch.Tensor] = {}
    with watch_boundaries(model, seen.__setitem__):
        model(input_ids=windows.ids)
    return seen[max(seen)]


def test_what_no_configuration_describes_is_refused():
    """Every second block is a mixture of experts, and no setting says another pattern."""
    config = transformers.Qwen2MoeConfig(**MOE, num_experts=4, shared_expert_intermediate_size=16, decoder_sparse_step=2)
    model = transformers.Qwen2MoeForCausalLM(config)
    with pytest.raises(
        ValueError, match=r"cannot be without blocks \[1\]: its block 2 would be block 1, and a stock block 1"
    ):
        plan_shortening(model, [1])
    drop_blocks(model, [1, 2])  # a whole period
    assert len(find_blocks(model)) == 3


def test_a_hybrid_keeps_an_attention_block():
    kinds = ["linear_attention", "full_attention", "linear_attention", "linear_attention", "linear_attention"]
    config = transformers.Qwen3NextConfig(
        **MOE, head_dim=8, layer_types=kinds, num_experts=4, shared_expert_intermediate_size=16, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, mlp_only_layers=[],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"needs one of its attention blocks \[1\]"):
        plan_shortening(transformers.Qwen3NextForCausalLM(config), [1])


@given(st.integers(2, 40).flatmap(lambda depth: st.tuples(st.just(depth), st.sets(st.integers(0, depth - 1), min_size=1))))
def test_settings_follow_their_layers(case):
    depth, chosen = case
    kept = sorted(chosen)
    marked = [index for index in range(depth) if index % 3 == 0]
    settings = {
        "layer_types": [f"kind {index}" for index in range(depth)], "moe_layers": marked, "eos_token_id": [0, 1],
        "per_layer_config": {str(index): {"width": index} for index in marked}, "first_k_dense_replace": depth // 2,
        "hidden_size": depth, "attention_types": [[["a"], depth - 1], [["b"], 1]], "num_nextn_predict_layers": 1,
        "tie_word_embeddings": True,
    }  # fmt: skip
    result = keep_layers(settings, kept, depth)
    assert result["layer_types"] == [f"kind {index}" for index in kept]
    assert [kept[position] for position in result["moe_layers"]] == [index for index in kept if index in marked]
    assert result["first_k_dense_replace"] == len([index for index in kept if index < depth // 2])
    assert {kept[int(key)]: value["width"] for key, value in result["per_layer_config"].items()} == {
        index: index for index in kept if index in marked
    }
    assert [kind for pattern, times in result["attention_types"] for kind in pattern * times] == [
        "b" if index == depth - 1 else "a" for index in kept
    ]
    same = ("eos_token_id", "hidden_size", "num_nextn_predict_layers", "tie_word_embeddings")
    assert {name: result[name] for name in same} == {name: settings[name] for name in same}


def test_the_configuration_decides_what_is_loaded_so_it_is_read_back(llama, tokenizer, tmp_path, monkeypatch):
    """A scale that is set in memory alone, and weights that a writer changes, are found before the folder is there."""
    recipe = Recipe(base_model="tiny", num_replaced=1, blocks=(2,), selection="listed")
    apply_replacement(llama, Replacement((2,), {2: AffineMap(torch.zeros(32, 32), torch.ones(32))}))
    scaled = copy.deepcopy(llama)
    for block in find_blocks(scaled):
        block.self_attn.scaling *= 3
    with pytest.raises(ValueError, match="its logits differ by"):
        save(scaled, tokenizer, tmp_path / "scaled", recipe=recipe)

    write = type(llama).save_pretrained

    def write_less(model, folder, **arguments):
        write(model, folder, **arguments)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] += 0.01
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(type(llama), "save_pretrained", write_less)
    with pytest.raises(ValueError, match=r"its weight 'model\.norm\.weight' loads with other values"):
        save(llama, tokenizer, tmp_path / "changed", recipe=recipe)
    assert not list(tmp_path.iterdir())


def test_a_model_that_fits_in_memory_once_is_read_back_in_parts(llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("shoal.checkpoints.read_back._fits_again", lambda _model: False)
    recipe = Recipe(base_model="tiny", num_replaced=1, blocks=(2,), selection="listed")
    for name, maps in {"linear": {2: random_map(2)}, "dropped": {}}.items():
        student = make_model("llama")
        apply_replacement(student, Replacement((2,), maps))
        save(student, tokenizer, tmp_path / name, recipe=recipe)
        find_blocks(student)[2].self_attn.scaling *= 3
        with pytest.raises(ValueError, match="its output of block 2 differ"):
            save(student, tokenizer, tmp_path / "scaled", recipe=recipe)
