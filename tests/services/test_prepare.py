"""What calibration over a cluster moves: moments, whose size is that of the model and not of the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_prose
from shoal.checkpoints.load import load_model
from shoal.linearity.moments import Moments
from shoal.measure.targets import TeacherTargets, measure_targets
from shoal.models.structure import find_blocks
from shoal.text.corpus import Corpus
from shoal_services.search.config import SearchConfig, load_config
from shoal_services.search.folder import RunFolder
from shoal_services.search.prepare import join, list_wholes, measure_piece, split, windows_of, write_corpus

NUM_WORKERS = 4


def measure_shards(config: SearchConfig, folder: RunFolder, whole: str = "moments") -> int:
    """Measures in four pieces as four workers do; returns the bytes that they hand over."""
    folder.claim_search(config)
    payload = config.model_dump(mode="json")
    write_corpus(payload, folder.root)
    corpus = Corpus.load(folder.prepared / "corpus.safetensors")
    pieces = split(config, corpus, whole, NUM_WORKERS)
    assert len(pieces) == NUM_WORKERS
    for piece in pieces:
        assert measure_piece(payload, folder.root, piece) is None, "nothing goes through the object store"
    moved = sum((folder.prepared / f"{piece.name}.safetensors").stat().st_size for piece in pieces)
    join(folder, whole, pieces, windows_of(corpus, whole))
    return moved


@pytest.fixture
def config(root: Path, tmp_path: Path, tiny_random: str) -> SearchConfig:
    """`smoke.yaml` on texts that fill as many windows as one likes."""
    smoke = load_config(root / "tune_configs" / "smoke.yaml")
    train, held_out = (str(write_prose(tmp_path / f"{seed}.txt", num_sentences=3000, seed=seed)) for seed in range(2))
    texts = smoke.texts.model_copy(update={"train": (train,), "evaluation": (held_out,)})
    return smoke.model_copy(update={"texts": texts})


def test_targets_in_pieces_are_those_of_the_whole(config: SearchConfig, tmp_path: Path):
    space = config.space.model_copy(update={"distillation_tokens": 8192, "window": 128, "temperature": 2.0})
    config, folder = config.model_copy(update={"space": space}), RunFolder(tmp_path / "run")
    measure_shards(config, folder, "distillation")
    found = TeacherTargets.load(folder.prepared / "distillation.safetensors")
    windows = Corpus.load(folder.prepared / "corpus.safetensors").distillation
    assert windows is not None
    expected = measure_targets(load_model("tiny-random", dtype="float32"), windows, temperatures=(1.0, 2.0))
    found.require(windows)
    torch.testing.assert_close(found.nll, expected.nll)
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.log_normalizers.keys() == expected.log_normalizers.keys() == {1.0, 2.0}


def test_moments_of_a_streamed_model_come_in_one_piece(config: SearchConfig, tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    folder.claim_search(config)
    write_corpus(config.model_dump(mode="json"), folder.root)
    corpus = Corpus.load(folder.prepared / "corpus.safetensors")
    streamed = config.model_copy(update={"run": config.run.model_copy(update={"streamed": True})})
    for whole in list_wholes(corpus):
        pieces = split(streamed, corpus, whole, NUM_WORKERS)
        assert [piece.low for piece in pieces[1:]] == [piece.high for piece in pieces[:-1]]
        assert (pieces[0].low, pieces[-1].high) == (0, len(windows_of(corpus, whole)))
        assert len(pieces) == 1 or whole != "moments"


def test_shards_have_the_size_of_the_model_whatever_the_tokens(config: SearchConfig, tmp_path: Path):
    model = load_model("tiny-random", dtype="float32")
    num_blocks, width = len(find_blocks(model)), model.config.hidden_size
    moved = {}
    for num_tokens in (8_192, 32_768):
        texts = config.texts.model_copy(update={"calibration_tokens": num_tokens})
        folder = RunFolder(tmp_path / str(num_tokens))
        moved[num_tokens] = measure_shards(config.model_copy(update={"texts": texts}), folder)
        assert Moments.load(folder.prepared / "moments.safetensors").num_tokens == pytest.approx(num_tokens, rel=0.02)
    few, many = moved.values()
    unit = NUM_WORKERS * num_blocks * width**2 * 8
    print(f"moved by {NUM_WORKERS} workers: {few:,} bytes for 8,192 tokens, {many:,} for 32,768; "
          f"{many / unit:.2f} float64 per worker, block and d²")  # fmt: skip
    # Token counts in the header are longer numbers; nothing else grows.
    assert abs(many - few) < 1024
    assert many < 12 * unit
