"""Encoder blocks give way to maps: exactly where they are linear, at a measured cost elsewhere, and the folder is whole."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import shoal as library
import torch
import transformers
from commands import assert_refused
from conftest import make_ids, write_prose
from encoders import ENCODER_DECODERS, ENCODERS, make_encoder, save_with_tokenizer
from shoal.checkpoints.load import load_tokenizer
from shoal.encoders import MASKED_SHARE, Cost, choose_masked, compress_encoder, measure_cost
from shoal.models.shorten import drop_blocks
from shoal.models.structure import find_blocks
from shoal.recipe import Recipe
from shoal.replace.in_order import fit_in_order
from shoal.replace.maps import Replacement, apply_replacement
from shoal.text.corpus import load_corpus
from shoal.text.windows import TokenWindows
from shoal.texts import Texts

FAMILIES = [*ENCODERS, *ENCODER_DECODERS]


def outputs(model, ids: torch.Tensor) -> torch.Tensor:
    given = {"labels": ids, "use_cache": False} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        said = model(input_ids=ids, **given)
    return said.logits if "logits" in said else said.last_hidden_state


def make_block_linear(model, index: int) -> None:
    """Whatever the block computes, x + x A leaves it."""
    update = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 32

    def answer(_block, args, output):
        stream = args[0] + args[0] @ update
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    find_blocks(model)[index].register_forward_hook(answer)


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> str:
    return str(write_prose(tmp_path_factory.mktemp("prose") / "prose.txt", num_sentences=800))


def texts_of(prose: str) -> Texts:
    return Texts(train=(prose,), evaluation=(prose,), calibration_tokens=4096, evaluation_tokens=1024, window=64)


@pytest.mark.parametrize("family", FAMILIES)
def test_replacing_nothing_changes_nothing(family):
    model, ids = make_encoder(family), make_ids(2, 16)
    changed = copy.deepcopy(model)
    apply_replacement(changed, Replacement(()))
    assert torch.equal(outputs(changed, ids), outputs(model, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_block_is_replaced_exactly(family, windows):
    model, ids = make_encoder(family), make_ids(2, 32, seed=7)
    make_block_linear(model, 2)
    replacement = fit_in_order(model, (2,), windows, ridge=0.0, refit_outputs=False)
    changed = copy.deepcopy(model)
    apply_replacement(changed, replacement)
    assert len(find_blocks(changed)) == 3
    torch.testing.assert_close(outputs(changed, ids), outputs(model, ids), rtol=1e-3, atol=1e-3)
    dropped = copy.deepcopy(model)
    apply_replacement(dropped, Replacement((2,)))
    assert not torch.allclose(outputs(dropped, ids), outputs(model, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["t5", "modernbert"])
def test_a_first_block_that_holds_more_has_to_stay(family):
    """T5's holds the position biases of all, ModernBERT's has no first norm: no other can be the first."""
    with pytest.raises(ValueError, match="its block 1 would be block 0, and a stock block 0 has"):
        drop_blocks(make_encoder(family), [0])


@pytest.mark.parametrize("kind", ["linear", "low_rank", "dropped"])
@pytest.mark.parametrize(
    ("family", "headless"), [*((family, False) for family in FAMILIES), ("bert", True), ("roberta", True)]
)
def test_a_compressed_encoder_is_what_was_measured(family, headless, kind, prose, tmp_path, tiny_random):
    """The folder gives the changed model and its cost again; with transformers alone too."""
    model = make_encoder(family)
    save_with_tokenizer(model.base_model if headless else model, tmp_path / "dense", tiny_random)
    recipe = Recipe(
        base_model=str(tmp_path / "dense"), num_replaced=2, blocks=(1, 2), selection="listed", dtype="float32", kind=kind,
        rank=4 if kind == "low_rank" else None,
    )  # fmt: skip
    point = compress_encoder(recipe, tmp_path / "out", texts=texts_of(prose))
    assert point.recipe.blocks == (1, 2) and point.num_parameters < point.dense_num_parameters
    (cost,) = point.costs
    expected = "seq2seq loss" if family in ENCODER_DECODERS else "embedding" if headless else "masked-LM loss"
    assert cost.measure.startswith(expected)
    assert cost.difference == pytest.approx(cost.value - cost.dense) and cost.difference_standard_error > 0

    dense, loaded = (library.load(tmp_path / name, dtype="float32") for name in ("dense", "out"))
    assert len(find_blocks(loaded)) == 2
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    (held,) = load_corpus(texts_of(prose), tokenizer, dense.config).evaluation
    assert measure_cost(dense, loaded, tokenizer, held) == cost
    stored = json.loads((tmp_path / "out" / "costs.json").read_text())
    assert stored["costs"][0] == json.loads(Cost.model_dump_json(cost))

    auto = transformers.AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else transformers.AutoModelForMaskedLM
    auto = transformers.AutoModel if headless else auto
    theirs = auto.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    ids = make_ids(2, 64, vocab_size=250)
    assert torch.equal(outputs(theirs, ids), outputs(loaded, ids))
    assert not torch.allclose(outputs(loaded, ids), outputs(dense, ids))


def test_the_masked_loss_is_that_of_the_masked_tokens(tmp_path, tiny_random):
    model, ids = make_encoder("bert"), make_ids(4, 40, vocab_size=250)
    tokenizer = load_tokenizer(str(save_with_tokenizer(model, tmp_path / "bert", tiny_random)))
    masked = choose_masked(ids, 0)
    assert masked.sum(1).tolist() == [round(MASKED_SHARE * 38)] * 4 and not bool(masked[:, [0, -1]].any())
    assert not torch.equal(masked[0], masked[1]) and torch.equal(choose_masked(ids[2:], 2), masked[2:])
    with torch.no_grad():
        labels = ids.masked_fill(~masked, -100)
        expected = [
            float(model(input_ids=ids[i : i + 1].masked_fill(masked[i], 259), labels=labels[i : i + 1]).loss)
            for i in range(4)
        ]
    cost = measure_cost(model, model, tokenizer, TokenWindows(ids, "random"))
    assert tokenizer.mask_token_id == 259
    assert cost.value == pytest.approx(sum(expected) / 4, rel=1e-5) and cost.difference == 0


def test_the_seq2seq_loss_is_the_models_own(tmp_path, tiny_random):
    """Without a mask token the text itself is read."""
    model, ids = make_encoder("bart"), make_ids(4, 40, vocab_size=250)
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    cost = measure_cost(model, model, load_tokenizer(tiny_random), TokenWindows(ids, "random"))
    assert cost.value == pytest.approx(expected, rel=1e-5)
    tokenizer = load_tokenizer(str(save_with_tokenizer(model, tmp_path / "bart", tiny_random)))
    assert measure_cost(model, model, tokenizer, TokenWindows(ids, "random")).value != pytest.approx(expected, rel=1e-5)


def test_a_masked_loss_needs_a_mask_token(tiny_random):
    model = make_encoder("bert")
    with pytest.raises(ValueError, match="no mask token"):
        measure_cost(model, model, load_tokenizer(tiny_random), TokenWindows(make_ids(4, 40), "random"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["-n", "1", "--kind", "folded"], "kind='folded' needs a causal decoder"),
        (["-n", "1", "--distil-tokens", "1024"], "distillation needs a causal decoder"),
        (["-n", "1", "--sparsity", "2:4"], "sparsity needs a causal decoder"),
        (["-n", "1", "--weight-share", "0.5"], "weight_share needs a causal decoder"),
        (["-n", "1", "--selection", "kl"], "a choice by KL needs a causal decoder"),
        (["-n", "1", "--streamed"], "an encoder cannot be streamed"),
        (["-n", "4"], "choose 2 or fewer"),
        (["--blocks", "7"], "the model has blocks 0 to 3"),
    ],
)
def test_what_an_encoder_cannot_be_is_refused(shoal, words, part, prose, tmp_path, tiny_random):
    save_with_tokenizer(make_encoder("bert"), tmp_path / "bert", tiny_random)
    texts = ["--text", prose, "--evaluation-text", prose, "--calibration-tokens", "4096", "--evaluation-tokens", "1024"]
    assert_refused(shoal("compress", "bert", *words, *texts), part)
    assert not [path for path in Path(tmp_path).iterdir() if path.name not in ("bert", "prose.txt")]


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_the_command_compresses_encoders(shoal, family, prose, tmp_path, tiny_random):
    save_with_tokenizer(make_encoder(family), tmp_path / family, tiny_random)
    words = ["--text", prose, "--evaluation-text", prose, "--calibration-tokens", "4096", "--evaluation-tokens", "1024"]
    words += ["--dtype", "float32"]
    said = shoal("compress", family, "-n", 1, *words, "--json")
    assert said.code == 0, said.errors
    point = json.loads(said.output)
    assert len(point["recipe"]["blocks"]) == 1 and point["artefact"] == f"{family}-linear-1"
    table = shoal("compress", family, "-n", 1, *words, "-o", "again")
    assert table.code == 0 and f"{point['costs'][0]['value']:.4f}" in table.output
    assert_refused(shoal("compress", family, "-n", 1, *words), "exists already")
    assert_refused(shoal("evaluate", f"{family}-linear-1", "--evaluation-text", prose), "needs a causal decoder")
    again = shoal("profile", f"{family}-linear-1", *words[:2], "--calibration-tokens", "4096", "--json")
    assert again.code == 0, again.errors
