"""Models load by alias, folder and file; what is no causal decoder is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import COMMON, make_ids, make_model
from safetensors.torch import load_file, save_file
from shoal.checkpoints.config import make_skeleton
from shoal.checkpoints.device import choose_dtype
from shoal.checkpoints.hashes import hash_weights
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.checkpoints.packaged import cache_folder, convert_packaged


@pytest.fixture
def folder(llama, tmp_path):
    llama.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_the_packaged_random_model(tiny_random):
    model, tokenizer = load_model(tiny_random, dtype="float32"), load_tokenizer(tiny_random)
    assert model.config.num_hidden_layers == 6
    assert len(tokenizer) == model.config.vocab_size == 257
    text = "Any text: ünïcode, 漢字."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert hash_weights(load_model(tiny_random, dtype="float32")) == hash_weights(model)


def test_packaged_models_are_made_once_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    state = torch.random.get_rng_state()
    first = convert_packaged("tiny-random")
    assert first == cache_folder() / "tiny-random" == tmp_path / "tiny-random"
    times = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert convert_packaged("tiny-random") == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == times
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-random"]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_packaged_model_that_is_asked_for_its_shape_first_is_made_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    assert make_skeleton("tiny-random").device.type == "meta"
    assert load_model("tiny-random").device.type != "meta"


def test_a_folder_gives_the_same_model(llama, folder):
    ids, loaded = make_ids(2, 8), load_model(str(folder), dtype="float32")
    assert not loaded.training
    assert hash_weights(loaded) == hash_weights(llama)
    device = loaded.device
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids.to(device)).logits.cpu(), llama(input_ids=ids).logits, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_come_in_the_dtype_asked_for(folder, dtype):
    assert load_model(str(folder), dtype=dtype).dtype == getattr(torch, dtype)
    assert choose_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(ValueError, match="dtype='int4' is not known; choose one of bfloat16, float16, float32"):
        load_model(str(folder), dtype="int4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-org/no-such-model", "check the name and the network"),
        ("no-such-model", "check the name and the network"),
        ("./no/such/folder", "does not exist; check the path"),
        ("no/such/folder", "does not exist; check the path"),
        ("no-such.gguf", "GGUF file 'no-such.gguf' does not exist"),
    ],
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_what_is_not_there_is_refused(name, message, load):
    with pytest.raises(ValueError, match=message):
        load(name)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("content", [b"garbage", b"GGUF" + bytes(40), b""])
def test_a_damaged_gguf_file_is_refused(tmp_path, content, load):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot load .*model\.gguf"):
        load(str(tmp_path / "model.gguf"))


def test_an_encoder_is_refused(tmp_path):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"it is an encoder \(bert\), and this needs a causal decoder"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(("dtype", "size"), [("float32", 0.02), ("float32", 0.2), ("bfloat16", 0.2)])
def test_a_decoder_that_looks_at_later_tokens_is_refused(tmp_path, dtype, size, monkeypatch):
    """Whatever its configuration says; also one whose random weights hardly look at other tokens."""
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=size,
    )
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    monkeypatch.setattr("shoal.checkpoints.load.is_causal", lambda _config: True)
    with pytest.raises(ValueError, match=r"bert looks at later tokens: it is an encoder; Shoal needs a causal decoder"):
        load_model(str(tmp_path), dtype=dtype)


def test_an_encoder_decoder_is_refused(tmp_path):
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder-decoder \(t5\)"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("size", [0, 7, 500, -1000])
def test_truncated_weights_are_refused(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="cannot load model"):
        load_model(str(folder))


def test_a_lacking_weight_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 weights, 'model.layers.3.mlp.up_proj.weight'"):
        load_model(str(folder))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_lacking_file_is_refused(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ValueError, match="cannot load model"):
        load_model(str(folder))


def test_code_that_comes_with_a_model_is_not_run(folder, capsys):
    """Nor does anybody ask whether to run it. A family that transformers has loads as that."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "own.py").write_text("raise SystemExit('this was run')")
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Slow", None]}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    with pytest.raises(ValueError, match="it needs code that comes with it, and Shoal runs none"):
        load_model(str(folder))
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_tokenizer(str(folder))
    assert "run the custom code" not in capsys.readouterr().out
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": classes}))
    assert load_model(str(folder)).config.model_type == "llama"


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("content", ["", "{not json", '{"model_type": "no-such-type"}'])
def test_a_damaged_configuration_is_refused(folder, content, load):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match="cannot load"):
        load(str(folder))


def test_weights_of_another_shape_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ValueError, match="cannot load model"):
        load_model(str(folder))


def test_hashes_name_weights(llama):
    before = hash_weights(llama)
    assert hash_weights(make_model("llama")) == before
    assert hash_weights(make_model("llama", seed=1)) != before
    with torch.no_grad():
        llama.model.layers[3].mlp.up_proj.weight[0, 0] += 1e-3
    assert hash_weights(llama) != before
    assert hash_weights(make_model("llama").bfloat16()) != before


def test_families_that_need_no_tokenizer_load_too(tmp_path):
    transformers.MistralForCausalLM(transformers.MistralConfig(**COMMON)).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config.model_type == "mistral"
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_is_causal(model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), dtype=dtype).config.model_type == model.config.model_type
