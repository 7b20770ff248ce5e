"""What files hold that would be ignored, or taken for weights: refused by name, or undone."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import COMMON, make_ids
from safetensors.torch import load_file, save_file
from shoal.checkpoints.config import read_config
from shoal.checkpoints.load import check_model, load_model, load_tokenizer
from shoal.compression import compress
from shoal.linearity.profile import profile_model
from shoal.recipe import Recipe
from shoal.texts import Texts

QUERY = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def folder(llama, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, weights: dict | None = None, **settings) -> str:
    """The folder with other weights (None takes one out) and settings."""
    found = load_file(folder / "model.safetensors") | (weights or {})
    save_file({k: v for k, v in found.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return str(folder)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({f"{QUERY}.weight": torch.ones(32, 32).to(torch.float8_e4m3fn)}, "quantised .*q_proj.weight' is F8_E4M3"),
        ({f"{QUERY}.weight": torch.ones(32, 32, dtype=torch.int8)}, "quantised .*q_proj.weight' is I8"),
        ({f"{QUERY}.weight_scale": torch.ones(1)}, "quantised .*weight_scale' is no weight"),
        ({f"{QUERY}.weight.absmax": torch.ones(1)}, "quantised .*absmax' is no weight"),
        ({f"{QUERY}.weight": None, f"{QUERY}.qweight": torch.ones(4, 32, dtype=torch.int32)}, "quantised .*qweight'"),
        ({"lm_head.weight_scale": torch.ones(1)}, "quantised .*lm_head.weight_scale'"),
        ({f"{QUERY}.lora_A.weight": torch.ones(4, 32)}, "hold an adapter .*lora_A"),
        ({f"{QUERY}.bias": torch.ones(32)}, "no place for 'model.layers.1.self_attn.q_proj.bias'"),
        ({"model.layers.1.post_norm.weight": torch.ones(32)}, "no place for 'model.layers.1.post_norm.weight'"),
        ({"lm_head.bias": torch.ones(128)}, "no place for 'lm_head.bias'"),
        ({"model.layers.5.mlp.up_proj.weight": torch.ones(48, 32)}, "hold a block 5 .*says 5 blocks"),
    ],
)
def test_tensors_that_would_be_ignored_or_misread_are_refused(folder, weights, message):
    with pytest.raises(ValueError, match=f"cannot load model .*{message}"):
        load_model(change(folder, weights), dtype="float32")


@pytest.mark.parametrize(
    "names", [["vision_tower.blocks.1.attn.bias", "mtp.0.proj.weight"], ["score.weight"], ["model.layers.5.enorm.weight"]]
)
def test_what_a_causal_model_does_not_need_is_left_out(llama, folder, names):
    change(folder, {name: torch.ones(4) for name in names}, num_nextn_predict_layers=1)
    change(folder, {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    ids, model = make_ids(1, 8), load_model(str(folder), dtype="float32", device=torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, llama(input_ids=ids).logits)


@pytest.mark.parametrize("read", [load_model, check_model])
@pytest.mark.parametrize(
    "settings",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "modelopt"}},
        {"quantization_config": {"bits": 4, "group_size": 64}},
        {"quantization": {"bits": 4, "group_size": 64}},
    ],
)
def test_quantisations_that_are_not_undone_are_refused(folder, tokenizer, settings, read):
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"its weights are quantised \(quantization\w* in config.json: \w+\)"):
        read(change(folder, **settings))


def test_eight_bit_floats_with_their_scales_are_undone(llama, folder):
    """The model of the weights times their scales, and nothing of it in the configuration."""
    stored = {}
    for name, weight in llama.named_parameters():
        if "proj" in name:
            scale = weight.detach().abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
            weight.data = stored[name].float() * scale
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    change(folder, stored, quantization_config=settings)
    ids, model = make_ids(1, 8), load_model(str(folder), dtype="float32", device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, llama(input_ids=ids).logits)
    assert "quantization_config" not in model.config.to_dict()
    with pytest.raises(ValueError, match="are not streamed so; load it whole once"):
        load_model(str(folder), streamed=True)


@pytest.mark.parametrize("beside", [False, True])
def test_adapters_are_refused_at_every_door(folder, tokenizer, tmp_path, beside):
    tokenizer.save_pretrained(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "the-base"}')
    if not beside:
        (folder / "config.json").unlink()
    message = r"a PEFT adapter \(LORA\) of 'the-base'.*merge it.*merge_and_unload\(\)\.save_pretrained"
    for door in (load_model, load_tokenizer, read_config, check_model):
        with pytest.raises(ValueError, match=message):
            door(str(folder))
    with pytest.raises(ValueError, match=message):
        compress(Recipe(base_model=str(folder), num_replaced=1), tmp_path / "out")


GEMMA = {
    **COMMON, "head_dim": 8, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "global_head_dim": 8,
    "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "known"), [("gemma4_text", True), ("gemma4_text", False), ("xlnet", False), ("openai-gpt", False)]
)
def test_families_without_a_plain_stream_are_refused(family, known, tmp_path, monkeypatch):
    """From the configuration where it tells, and always by trying."""
    arguments = (
        GEMMA if family == "gemma4_text" else {"vocab_size": 128, "d_model": 32, "d_inner": 48, "n_layer": 2, "n_head": 2}
    )
    arguments |= {"n_embd": 32} if family == "openai-gpt" else {}
    config = transformers.AutoConfig.for_model(family, **arguments)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    if not known:
        monkeypatch.setattr("shoal.checkpoints.plain_stream.SIDE_CHANNELS", ())
    with pytest.raises(ValueError, match=rf"{family} has no plain residual stream: .*{'=8' if known else ''}"):
        load_model(str(tmp_path / "model"), dtype="float32")
    with pytest.raises(ValueError, match="has no plain residual stream"):
        profile_model(str(tmp_path / "model"), Texts())


def test_blocks_that_remember_an_earlier_block_are_refused(llama, monkeypatch, tmp_path):
    """A value of block 0 that block 3 uses, without an argument that would tell."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    plain, kept = LlamaDecoderLayer.forward, []

    def forward(self, hidden_states, **rest):
        if self.self_attn.layer_idx == 0:
            kept[:] = [hidden_states]
        return plain(self, hidden_states, **rest) + (kept[0] if self.self_attn.layer_idx == 3 else 0)

    llama.save_pretrained(tmp_path)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    for streamed in (False, True):
        with pytest.raises(ValueError, match="know of the tokens by other ways than the stream"):
            load_model(str(tmp_path), dtype="float32", streamed=streamed)
