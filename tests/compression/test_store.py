"""A folder is whole or not there, and explains itself."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from shoal.checkpoints.hashes import hash_folder
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.checkpoints.store import load_point, save, save_point
from shoal.files import write_text
from shoal.point import Evaluation, Point, Size, Speed
from shoal.recipe import Distillation, Recipe
from shoal.replace.maps import AffineMap, Replacement, apply_replacement
from shoal.texts import Text

RECIPE = Recipe(base_model="tiny", num_replaced=1, blocks=(2,), selection="listed", dtype="float32", seed=7)
EVALUATION = Evaluation(
    text=Text(name="prose", sha256="0123456789abcdef", num_tokens=16384), dense_perplexity=11.11, dense_standard_error=0.22,
    perplexity=33.33, standard_error=0.44, log_ratio=0.5555, log_ratio_standard_error=0.0066,
    kl=0.7777, kl_standard_error=0.0088, top1_agreement=0.999,
)  # fmt: skip
POINT = Point(
    recipe=RECIPE, evaluations=(EVALUATION,),
    dense_size=Size(num_parameters=4000, num_bytes=16000, kv_bytes_per_token=1280),
    size=Size(num_parameters=3000, num_bytes=12000, kv_bytes_per_token=1024),
    dense_speed=Speed(prefill_tokens_per_s=1234, decode_tokens_per_s=56.7),
    speed=Speed(prefill_tokens_per_s=2345, decode_tokens_per_s=67.8),
)  # fmt: skip


class BrokenTokenizer:
    """Fails as a full disk would, after the weights are written."""

    def save_pretrained(self, folder) -> None:
        assert (folder / "model.safetensors").is_file()
        raise OSError("no space left on device")


@pytest.fixture
def folder(llama, tokenizer, tmp_path):
    save(llama, tokenizer, tmp_path / "out", recipe=RECIPE)
    return tmp_path / "out"


def test_a_folder_holds_model_tokenizer_and_recipe(folder, tokenizer):
    assert Recipe.model_validate_json((folder / "recipe.json").read_text()) == RECIPE
    assert transformers.AutoTokenizer.from_pretrained(folder)("abc") == tokenizer("abc")
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_save_that_fails_leaves_nothing(llama, tmp_path):
    with pytest.raises(OSError, match="no space left"):
        save(llama, BrokenTokenizer(), tmp_path / "out", recipe=RECIPE)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_os_error(llama, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save(llama, tokenizer, tmp_path / "file" / "out", recipe=RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_existing_folder_is_left_alone(llama, folder, tokenizer):
    before = hash_folder(folder)
    with torch.no_grad():
        llama.model.norm.weight.mul_(2)
    with pytest.raises(FileExistsError, match="exists already; delete it or choose another folder"):
        save(llama, tokenizer, folder, recipe=RECIPE)
    assert hash_folder(folder) == before


def test_a_point_survives_its_folder(folder):
    point = save_point(folder, POINT)
    assert point.artefact_sha256 == hash_folder(folder)
    assert load_point(folder) == point
    assert point.recipe == RECIPE


@pytest.mark.parametrize("content", [None, "", "{", '{"recipe": {}}', "[]"])
def test_a_damaged_point_is_refused(folder, content):
    if content is not None:
        (folder / "point.json").write_text(content)
    with pytest.raises(ValueError, match=r"out' is not a whole compressed model folder: point\.json"):
        load_point(folder)


def test_the_hash_of_a_folder_is_of_its_weights(llama, tokenizer, folder, tmp_path):
    save(llama, tokenizer, tmp_path / "same", recipe=RECIPE.model_copy(update={"seed": 8}))
    assert hash_folder(tmp_path / "same") == hash_folder(folder)
    with torch.no_grad():
        llama.model.norm.weight[0] += 1e-3
    save(llama, tokenizer, tmp_path / "other", recipe=RECIPE)
    assert hash_folder(tmp_path / "other") != hash_folder(folder)


def test_the_card_shows_every_number_beside_the_dense_one(folder):
    save_point(folder, POINT)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in (folder / "README.md").read_text().splitlines()
    ]
    numbers = {row[0]: row[1:] for row in rows if len(row) == 3}
    assert numbers[""] == ["dense", "this model"]
    assert numbers["perplexity, prose (16,384 tokens, sha256 01234567)"] == ["11.11 ± 0.22", "33.33 ± 0.44"]
    assert numbers["perplexity ratio (log ± paired)"] == ["1", "1.743 (log 0.5555 ± 0.0066)"]
    assert numbers["KL to dense, nats per token"] == ["0", "0.7777 ± 0.0088"]
    assert numbers["same top token as dense"] == ["100 %", "99.9%"]
    assert numbers["parameters"] == ["4,000", "3,000"]
    assert numbers["weights, bytes"] == ["16,000", "12,000"]
    assert numbers["KV cache, bytes per token"] == ["1,280", "1,024"]
    assert numbers["prefill, tokens/s"] == ["1,234", "2,345"]
    assert numbers["decode, tokens/s"] == ["56.7", "67.8"]


def test_the_card_says_what_was_learned_from_and_how_often(folder):
    lesson = {"distillation": Distillation(num_tokens=4096), "distillation_text": Text(name="prose", num_tokens=2048)}
    save_point(folder, POINT.model_copy(update={"recipe": RECIPE.model_copy(update=lesson)}))
    card = (folder / "README.md").read_text()
    assert "The blocks then learned what the dense model says, on 4,096 tokens of prose (2.0 times over)." in card


@pytest.mark.parametrize("kind", ["linear", "dropped"])
def test_the_card_says_how_to_load(folder, kind):
    """Stock models need no trust."""
    save_point(folder, POINT.model_copy(update={"recipe": RECIPE.model_copy(update={"kind": kind})}))
    card = (folder / "README.md").read_text()
    assert "base_model: tiny" in card
    assert "25.0% fewer parameters" in card
    assert ("trust_remote_code=True" in card) == (kind == "linear")
    assert "shoal.load(folder)" in card


def test_the_code_on_the_card_runs(llama, tokenizer, tmp_path):
    apply_replacement(llama, Replacement((2,), {2: AffineMap(torch.zeros(32, 32), torch.ones(32))}))
    save(llama, tokenizer, tmp_path / "out", recipe=RECIPE)
    save_point(tmp_path / "out", POINT)
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"folder": str(tmp_path / "out")}
    exec(code, names)
    assert names["model"].config.num_hidden_layers == 4
    assert names["tokenizer"]("abc") == tokenizer("abc")


def test_text_is_replaced_in_one_step(tmp_path):
    file = tmp_path / "point.json"
    for text in ("first", "second, ünïcode"):
        write_text(file, json.dumps(text))
        assert json.loads(file.read_text(encoding="utf-8")) == text
    assert [path.name for path in tmp_path.iterdir()] == ["point.json"]


def test_what_belongs_to_a_model_comes_along_and_what_is_not_there_is_not_named(llama, tokenizer, tmp_path):
    """Processors, terms and generation settings; no code and no blocks beyond the last that the folder does not hold."""
    source = tmp_path / "source"
    llama.config.auto_map = {"AutoModelForCausalLM": "modeling_own.OwnLlama"}
    llama.config.num_nextn_predict_layers = 1
    llama.save_pretrained(source)
    tokenizer.save_pretrained(source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps({**settings, "auto_map": {"AutoTokenizer": [None, "own.Own"]}})
    )
    (source / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false, "eos_token_id": [0, 2]}')
    files = {"preprocessor_config.json": "{}", "chat_template.jinja": "{{ messages }}", "LICENSE.txt": "terms"}
    files |= {"processor_config.json": '{"auto_map": {}}', "unrelated.txt": "x"}
    for name, text in files.items():
        (source / name).write_text(text)
    model = load_model(str(source), dtype="float32")
    apply_replacement(model, Replacement((2,)))
    save(model, load_tokenizer(str(source)), tmp_path / "out", recipe=RECIPE.model_copy(update={"base_model": str(source)}))
    out = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    assert {name: out.get(name) for name in files} == {**files, "processor_config.json": None, "unrelated.txt": None}
    assert not [name for name, text in out.items() if "auto_map" in text]
    assert json.loads(out["config.json"])["num_nextn_predict_layers"] == 0
    assert json.loads(out["generation_config.json"])["eos_token_id"] == [0, 2]
    assert load_model(str(tmp_path / "out")).config.num_hidden_layers == 4
    assert load_tokenizer(str(tmp_path / "out"))("abc") == tokenizer("abc")
