"""Models with their blocks on disk: the same numbers, and one block in memory at a time."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from conftest import FAMILIES, make_ids, make_model, write_prose
from safetensors.torch import load_file
from shoal.checkpoints.config import is_memory_short
from shoal.checkpoints.hashes import hash_weights
from shoal.checkpoints.load import load_model
from shoal.compression import compress
from shoal.large.on_disk import copy_model, in_memory, is_on_disk
from shoal.linearity.accumulate import measure_moments
from shoal.measure.perplexity import evaluate
from shoal.measure.size_and_speed import measure_size
from shoal.measure.targets import measure_targets
from shoal.models.structure import find_blocks
from shoal.recipe import Recipe
from shoal.replace.in_order import fit_in_order
from shoal.replace.maps import apply_replacement
from shoal.text.windows import TokenWindows
from shoal.texts import Texts

# How a block is called and what it returns differs between these.
DIFFERENT = {"llama": "linear", "gemma2": "dropped", "gpt2": "folded", "falcon": "low_rank"}


def load_both(family, tmp_path_factory):
    """A tiny model in memory, and the same streamed from its folder of several shards."""
    folder = tmp_path_factory.mktemp("models") / family
    make_model(family).save_pretrained(folder, max_shard_size=20_000)
    return load_model(str(folder), dtype="float32"), load_model(str(folder), dtype="float32", streamed=True)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    return load_both(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=DIFFERENT)
def different(request, tmp_path_factory):
    return load_both(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def few() -> TokenWindows:
    """11 windows: the last batch is a smaller one."""
    return TokenWindows(make_ids(11, 12), "random")


def num_in_memory(model) -> int:
    return sum(all(p.device.type != "meta" for p in block.parameters()) for block in find_blocks(model))


def test_a_streamed_model_computes_the_same(pair, few):
    whole, streamed = pair
    assert is_on_disk(streamed)
    assert num_in_memory(streamed) == 0
    with torch.no_grad():
        torch.testing.assert_close(streamed(input_ids=few.ids).logits, whole(input_ids=few.ids).logits, rtol=0, atol=0)
    assert num_in_memory(streamed) == 0
    assert hash_weights(streamed) == hash_weights(whole)
    assert measure_size(streamed) == measure_size(whole)


def test_moments_are_the_same(pair, few):
    """Bit by bit, but for the similarities, whose sums run in another order."""
    first, second = (measure_moments(model, few) for model in pair)
    assert (first.source, first.num_windows) == (second.source, second.num_windows)
    torch.testing.assert_close(second.similarity, first.similarity, rtol=1e-5, atol=1e-4)
    for name, gram in first.grams.items():
        for f in fields(gram):
            assert torch.equal(getattr(gram, f.name), getattr(getattr(second, name), f.name)), (name, f.name)
    for name in ("norm_ratio_sum", "cosine_sum", "num_compared", "sink_norm_ratio"):
        torch.testing.assert_close(getattr(second, name), getattr(first, name), rtol=1e-12, atol=0)


def test_targets_are_the_same(different, few):
    first, second = (measure_targets(model, few) for model in different)
    assert torch.equal(first.ids, second.ids)
    torch.testing.assert_close(second.nll, first.nll)
    torch.testing.assert_close(second.logits, first.logits)


def test_windows_whose_streams_are_too_large_go_through_in_groups(different, few, monkeypatch):
    expected, done = measure_targets(different[1], few), []
    monkeypatch.setattr("shoal.large.streamed.MAX_STREAM_BYTES", 4 * 12 * 32 * 4)  # four windows of 12 tokens
    found = measure_targets(different[1], few, on_progress=done.append)
    torch.testing.assert_close(found.nll, expected.nll)
    torch.testing.assert_close(found.logits, expected.logits)
    assert done == sorted(done) and done[-1] == len(few)


def test_fit_and_evaluation_are_the_same(different, few):
    """From the fit over the student's weights to its perplexity; all blocks are on disk in between."""
    kind = DIFFERENT[different[0].config.model_type]
    students, replacements = [], []
    for model in different:
        replacements.append(fit_in_order(model, (1, 3), few, kind=kind, rank=4 if kind == "low_rank" else None))
        students.append(copy_model(model))
        apply_replacement(students[-1], replacements[-1])
    assert num_in_memory(students[1]) == num_in_memory(different[1]) == 0
    torch.testing.assert_close(replacements[1].weights, replacements[0].weights, rtol=1e-3, atol=1e-4)
    dense = measure_targets(different[0], few)
    first, second = (evaluate(student, few, dense) for student in students)
    assert second.perplexity == pytest.approx(first.perplexity, rel=1e-4)
    assert second.kl == pytest.approx(first.kl, rel=1e-3)


def test_the_teacher_stays_as_it_is(different, few):
    _, streamed = different
    before = hash_weights(streamed)
    student = copy_model(streamed)
    apply_replacement(student, fit_in_order(streamed, (1, 3), few))
    assert hash_weights(streamed) == before
    assert len(find_blocks(streamed)) == 5


def test_a_block_is_held_once_for_all_who_use_it(different):
    block = find_blocks(different[1])[2]
    with in_memory(block):
        with in_memory(block):
            weights = list(block.parameters())
        assert next(block.parameters()) is weights[0]
        assert num_in_memory(different[1]) == 1
    assert num_in_memory(different[1]) == 0


@pytest.fixture(scope="module")
def compressed(tmp_path_factory, tiny_random):
    """The same recipe in memory and streamed: (folder, point) each."""
    folder = tmp_path_factory.mktemp("compressed")
    train, held_out = write_prose(folder / "a.txt"), write_prose(folder / "b.txt", seed=1)
    texts = Texts(
        train=str(train), evaluation=str(held_out), window=64, calibration_tokens=2048, evaluation_tokens=256,
        selection_tokens=128,
    )  # fmt: skip
    recipe = Recipe(base_model=tiny_random, num_replaced=2, selection="linearity", dtype="float32")
    return [
        (folder / name, compress(recipe, folder / name, texts=texts, streamed=streamed))
        for name, streamed in (("whole", False), ("streamed", True))
    ]


def test_the_same_recipe_gives_the_same_folder(compressed):
    (whole, first), (streamed, second) = compressed
    assert first.recipe == second.recipe
    assert first.dense_size == second.dense_size
    assert first.size == second.size
    assert second.perplexity == pytest.approx(first.perplexity, rel=1e-5)
    assert (first.speed is None, second.speed is None) == (False, True)
    one, other = (
        {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()} for folder in (whole, streamed)
    )
    assert sorted(one) == sorted(other)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)
    assert {f.name for f in whole.iterdir() if f.suffix != ".safetensors"} <= {f.name for f in streamed.iterdir()}


def test_the_streamed_folder_is_sharded_and_loads(compressed):
    (whole, _), (streamed, _) = compressed
    assert len(list(streamed.glob("*.safetensors"))) > 2
    ids = make_ids(2, 16)
    with torch.no_grad():
        logits = [load_model(str(folder), dtype="float32")(input_ids=ids).logits for folder in (whole, streamed)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-4)


def test_memory_decides_if_nobody_does(tiny_random):
    assert not is_memory_short(tiny_random)
    assert is_memory_short(tiny_random, num_copies=10**9)


def test_what_cannot_be_streamed_is_refused(tmp_path, tiny_random, compressed):
    with pytest.raises(ValueError, match=r"a streamed model cannot be distilled by one process.*run\.streamed"):
        recipe = Recipe(base_model=tiny_random, num_replaced=2, distillation={"num_tokens": 1024})
        compress(recipe, tmp_path / "out", streamed=True)
    with pytest.raises(ValueError, match="holds linear blocks"):
        load_model(str(compressed[0][0]), streamed=True)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match="convert"):
        load_model(str(tmp_path / "model.gguf"), streamed=True)


def test_a_damaged_shard_is_refused(tmp_path, tiny_random):
    folder = tmp_path / "model"
    load_model(tiny_random).save_pretrained(folder, max_shard_size=100_000)
    next(folder.glob("*00002*.safetensors")).unlink()
    with pytest.raises(ValueError, match="cannot load model"):
        load_model(str(folder), streamed=True)
