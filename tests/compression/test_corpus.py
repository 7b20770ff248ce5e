"""Every role gets its own text, whole windows of it, and evaluation text is never trained on."""

from __future__ import annotations

import pytest
import transformers
from conftest import write_prose
from pydantic import ValidationError
from shoal.text.corpus import load_corpus, load_evaluation
from shoal.text.leakage import check_overlap
from shoal.texts import Texts

CONFIG = transformers.LlamaConfig(hidden_size=32, max_position_embeddings=256)
SMALL = {"calibration_tokens": 4096, "evaluation_tokens": 2048, "selection_tokens": 1024, "window": 64}


@pytest.fixture
def prose(tmp_path):
    return [str(write_prose(tmp_path / f"{name}.txt", seed=seed)) for seed, name in enumerate("abc")]


def texts(train: list[str], evaluation: list[str], **changes) -> Texts:
    return Texts(train=tuple(train), evaluation=tuple(evaluation), **{**SMALL, **changes})


@pytest.mark.parametrize(("window", "distillation", "refused"), [(512, 64, 512), (64, 512, 512)])
def test_windows_longer_than_the_context_are_refused(prose, tokenizer, window, distillation, refused):
    with pytest.raises(
        ValueError, match=f"window={refused} is longer than the model's context of 256 tokens; choose 256 or less"
    ):
        load_corpus(
            texts(prose[:1], prose[1:2], window=window), tokenizer, CONFIG,
            distillation_tokens=1024, distillation_window=distillation,
        )  # fmt: skip


def test_without_distillation_its_window_does_not_matter(prose, tokenizer):
    """The default of 512 tokens must not refuse a model of shorter context."""
    corpus = load_corpus(texts(prose[:1], prose[1:2]), tokenizer, CONFIG)
    assert corpus.distillation is None
    assert corpus.selection.ids.shape == (16, 64)


@pytest.mark.parametrize("context", [None, 256])
def test_roles_have_the_tokens_they_were_promised(prose, tokenizer, context):
    config = transformers.PretrainedConfig(max_position_embeddings=context, vocab_size=257)
    wanted = texts(prose[:1], prose[1:])
    corpus = load_corpus(wanted, tokenizer, config, distillation_tokens=2560, distillation_window=128)
    assert corpus.calibration.ids.shape == (64, 64)
    assert corpus.distillation.ids.shape == (20, 128)
    assert corpus.selection.ids.shape == (8, 128)
    assert [windows.ids.shape for windows in corpus.evaluation] == [(32, 64)] * 2
    # The file's name, not where it lies: it goes into the recipe.
    assert [windows.name for windows in corpus.evaluation] == ["b.txt", "c.txt"]


def test_two_training_sources_take_turns(prose, tokenizer):
    alone = [
        load_corpus(texts([name], prose[2:], calibration_tokens=2048), tokenizer, CONFIG).calibration for name in prose[:2]
    ]
    both = load_corpus(texts(prose[:2], prose[2:]), tokenizer, CONFIG).calibration
    assert both.num_tokens == 4096
    assert both.ids[::2].tolist() == alone[0].ids.tolist()
    assert both.ids[1::2].tolist() == alone[1].ids.tolist()
    assert both.name == "a.txt + b.txt"


def test_a_shared_source_is_shared_out(prose, tokenizer):
    corpus = load_corpus(texts(prose[:1], prose[:1]), tokenizer, CONFIG, distillation_tokens=2048, distillation_window=64)
    roles = [corpus.calibration, corpus.distillation, corpus.selection, *corpus.evaluation]
    for index, windows in enumerate(roles):
        check_overlap(roles[:index], [windows], ngram=16)


def test_the_same_text_twice_is_a_leak(prose, tokenizer, tmp_path):
    twin = write_prose(tmp_path / "twin.txt", seed=0)
    with pytest.raises(ValueError, match="overlaps"):
        load_corpus(texts(prose[:1], [str(twin)]), tokenizer, CONFIG)


def test_the_corpus_is_the_same_again(prose, tokenizer):
    first, second = (load_corpus(texts(prose[:2], prose[1:]), tokenizer, CONFIG) for _ in range(2))
    assert first.calibration.sha256 == second.calibration.sha256
    assert [w.sha256 for w in first.evaluation] == [w.sha256 for w in second.evaluation]


def test_too_short_text_is_refused_by_name(tmp_path, tokenizer, prose):
    (tmp_path / "short.txt").write_text("Only this.\n")
    with pytest.raises(ValueError, match=r"short\.txt' has \d+ tokens, fewer than one window"):
        load_corpus(texts([str(tmp_path / "short.txt")], prose[:1]), tokenizer, CONFIG)


@pytest.mark.parametrize(
    "changes", [{"train": ()}, {"evaluation": ()}, {"window": 4}, {"calibration_tokens": 0}, {"shuffle": True}]
)
def test_impossible_texts_are_refused(changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        Texts(**changes)


def test_calibration_grows_with_the_width():
    assert [Texts().find_calibration_tokens(width) for width in (0, 576, 4096, 16384)] == [32768, 32768, 65536, 262144]
    assert Texts(calibration_tokens=9).find_calibration_tokens(4096) == 9


@pytest.mark.parametrize("role", ["calibration", "evaluation"])
def test_tokens_beyond_the_embeddings_are_refused_by_name(prose, tokenizer, role, tmp_path):
    tokenizer.add_tokens(["zebra"])  # token 257 of 257
    with (tmp_path / ("a.txt" if role == "calibration" else "b.txt")).open("r+") as file:
        file.write("zebra zebra")
    config = transformers.LlamaConfig(vocab_size=257, max_position_embeddings=256)
    message = (
        r"token 257 \('zebra'\) of this text, and the model has embeddings for 257 tokens: they do not belong together"
    )
    with pytest.raises(ValueError, match=message):
        load_corpus(texts(prose[:1], prose[1:2]), tokenizer, config)
    if role == "evaluation":
        with pytest.raises(ValueError, match=message):
            load_evaluation(texts(prose[:1], prose[1:2]), tokenizer, config, ())


def test_an_evaluation_window_beyond_the_context_is_refused(prose, tokenizer):
    with pytest.raises(ValueError, match="window=512 is longer than the model's context of 256 tokens"):
        load_evaluation(texts(prose[:1], prose[1:2], window=512), tokenizer, CONFIG, ())
