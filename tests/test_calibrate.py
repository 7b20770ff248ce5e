"""What calibration over a cluster moves: moments, whose size is that of the model and not of the text."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_prose
from shoal.blocks import find_blocks
from shoal.corpus import Corpus
from shoal.models import load_model
from shoal.moments import Moments
from shoal_services.calibrate import _list_pieces, _measure_piece, _merge_shards, _write_corpus
from shoal_services.config import SearchConfig, load_config
from shoal_services.folder import RunFolder

NUM_WORKERS = 4


def measure_shards(config: SearchConfig, folder: RunFolder) -> int:
    """Calibrates in four shards as four workers do; returns the bytes that they hand over."""
    folder.claim_search(config)
    payload = config.model_dump(mode="json")
    _write_corpus(payload, folder.root)
    pieces = _list_pieces(Corpus.load(folder.prepared / "corpus.safetensors"), NUM_WORKERS)
    shards = {name: span for name, span in pieces.items() if name.startswith("shard.")}
    assert len(shards) == NUM_WORKERS
    for name, span in shards.items():
        assert _measure_piece(payload, folder.root, name, span) is None, "nothing goes through the object store"
    moved = sum((folder.prepared / f"{name}.safetensors").stat().st_size for name in shards)
    _merge_shards(folder, list(shards))
    return moved


def test_shards_have_the_size_of_the_model_whatever_the_tokens(root: Path, tmp_path: Path, tiny_random: str):
    config = load_config(root / "tune_configs" / "smoke.yaml")
    prose = [str(write_prose(tmp_path / f"{seed}.txt", num_sentences=3000, seed=seed)) for seed in range(2)]
    model = load_model(tiny_random, dtype="float32")
    num_blocks, width = len(find_blocks(model)), model.config.hidden_size
    moved = {}
    for num_tokens in (8_192, 32_768):
        texts = config.texts.model_copy(
            update={"train": (prose[0],), "evaluation": (prose[1],), "calibration_tokens": num_tokens}
        )
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
