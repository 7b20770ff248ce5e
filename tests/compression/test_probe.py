"""A planted label is found and a random one is not; a text's embedding is its own, whatever stands beside it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from shoal.checkpoints.load import load_model
from shoal.checkpoints.store import save
from shoal.paper.probe import ProbeTexts, embed_texts, load_probe_texts, probe, probe_model
from shoal.recipe import Recipe
from shoal.replace.maps import Replacement, apply_replacement

WORDS = ["".join(random.Random(seed).choices("abcdefghijklm", k=5)) for seed in range(300)]


def make_texts(num_texts: int, *, planted: bool, seed: int = 0) -> ProbeTexts:
    """Texts of random words; half of the labels are "yes": for those with a Z in them, or by chance."""
    draw = random.Random(seed)
    texts, labels = [], []
    for index in range(num_texts):
        words = draw.choices(WORDS, k=6)
        words[draw.randrange(6)] = "Z" if index % 2 else "y"
        texts.append(" ".join(words))
        labels.append("yes" if index % 2 else "no")
    if not planted:
        draw.shuffle(labels)
    return ProbeTexts("made", texts, labels)


def test_a_planted_label_is_found(tiny_random):
    result = probe_model(tiny_random, make_texts(160, planted=True), dtype="float32")
    assert [layer.num_passed for layer in result.layers] == list(range(7))
    assert result.layers[0].accuracy > 0.95, "which tokens a text has is linear in the mean of their embeddings"
    assert all(layer.accuracy - 0.5 > 4 * layer.standard_error for layer in result.layers)
    assert (result.num_examples, result.num_classes, result.majority) == (160, 2, 0.5)


def test_a_random_label_is_not(tiny_random):
    for layer in probe_model(tiny_random, make_texts(160, planted=False), dtype="float32").layers:
        assert abs(layer.accuracy - 0.5) < 4 * layer.standard_error


def test_the_standard_error_is_that_of_a_share():
    features = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    accuracy, error = probe(features, ["a", "b"] * 50)
    assert error == pytest.approx((accuracy * (1 - accuracy) / 99) ** 0.5)


def test_a_coordinate_that_is_the_label_is_read_perfectly():
    features = torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    labels = [str(index % 3) for index in range(90)]
    features[:, 2] = torch.tensor([10.0 * int(label) for label in labels])
    features[:, 5] = torch.tensor([10.0 * (label == "1") for label in labels])
    assert probe(features, labels) == (1.0, 0.0)


def test_an_embedding_does_not_depend_on_the_texts_beside_it(tiny_random, tokenizer):
    model = load_model(tiny_random, dtype="float32")
    texts = ["short", "a text that is a good deal longer than the others", "mid length"]
    together = embed_texts(model, tokenizer, texts, window=64)
    alone = torch.cat([embed_texts(model, tokenizer, [text], window=64) for text in texts], dim=1)
    torch.testing.assert_close(together, alone)
    assert together.shape == (7, 3, 64)
    cut = embed_texts(model, tokenizer, [texts[1][:10]], window=64)
    torch.testing.assert_close(embed_texts(model, tokenizer, texts[1:2], window=10), cut)


def test_a_token_that_dwarfs_the_others_counts_as_one(tiny_random, tokenizer):
    model = load_model(tiny_random, dtype="float32")
    plain = embed_texts(model, tokenizer, ["Zebra"], window=8)[0]
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("Z")["input_ids"][0]] *= 1000
    torch.testing.assert_close(embed_texts(model, tokenizer, ["Zebra"], window=8)[0], plain)


def test_a_compressed_model_is_named_by_the_blocks_of_its_dense_model(tiny_random, tokenizer, tmp_path):
    recipe = Recipe(base_model=tiny_random, num_replaced=2, blocks=(2, 3), kind="dropped", selection="listed")
    model = load_model(tiny_random, dtype="float32")
    apply_replacement(model, Replacement((2, 3)))
    save(model, tokenizer, tmp_path / "small", recipe=recipe)
    labelled = make_texts(40, planted=True)
    dense = probe_model(tiny_random, labelled, dtype="float32")
    small = probe_model(str(tmp_path / "small"), labelled, dtype="float32")
    assert [layer.num_passed for layer in small.layers] == [0, 1, 4, 5, 6]
    assert small.layers[:2] == dense.layers[:2], "nothing was changed before"


def write_lines(path: Path, *rows: object) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_labels_are_strings_numbers_or_truth_values(tmp_path):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": 1}, "", {"text": "c", "label": True, "more": 0}]
    labelled = load_probe_texts(write_lines(tmp_path / "d.jsonl", *rows))
    assert (labelled.texts, labelled.labels, labelled.name) == (["a", "b", "c"], ["x", "1", "True"], "d.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{torn", r"line 2, is no JSON"),
        ([1, 2], r"row 2, is '\[1, 2\]', and no object"),
        ({"text": " ", "label": 1}, r"row 2: 'text' ' ' must be a text"),
        ({"text": "a", "label": 0.5}, r"row 2: .* 'label' 0\.5 a string, a whole number or true or false"),
        ({"text": "a", "class": 1}, r"row 2: .* 'label' None.*; it has text, class"),
    ],
)
def test_a_line_that_is_no_labelled_text_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_probe_texts(write_lines(tmp_path / "d.jsonl", {"text": "good", "label": 1}, row))


def test_no_texts_one_class_and_too_few_of_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no labelled text"):
        load_probe_texts(write_lines(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="has the one label 'a': probing needs two classes or more"):
        ProbeTexts("d", ["x", "y"], ["a", "a"]).require(2)
    with pytest.raises(ValueError, match="has 1 texts with label 'b': 3 folds need 3 or more"):
        ProbeTexts("d", list("wxyz"), list("aaab")).require(3)
