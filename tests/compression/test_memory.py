"""What a streamed model takes in memory: minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shoal.checkpoints.load import load_model, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

MIB = 2**20

# The peak is of private pages beyond what the imports hold: files that are mapped do not count, the system can drop them.
SCRIPT = """
import json, re, sys, threading
from pathlib import Path
import torch
from shoal.compression import compress
from shoal.recipe import Recipe
from shoal.texts import Texts

def read():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

folder, out, train, held_out, streamed = sys.argv[1:]
torch.set_num_threads(1)
torch.randn(8, 8) @ torch.randn(8, 8)
before, peak, over = read(), [0], threading.Event()

def watch():
    while not over.wait(0.02):
        peak[0] = max(peak[0], read() - before)

threading.Thread(target=watch, daemon=True).start()
texts = Texts(train=train, evaluation=held_out, window=256, calibration_tokens=10_240, evaluation_tokens=1_024,
              selection_tokens=512)
recipe = Recipe(base_model=folder, num_replaced=4, dtype="float32", selection="listed", blocks=(12, 13, 14, 15))
point = compress(recipe, Path(out), texts=texts, streamed=streamed == "streamed")
over.set()
print(json.dumps({"peak": peak[0], "perplexity": point.perplexity, "dense": point.evaluations[0].dense_perplexity,
                  "weights": point.dense_size.num_bytes, "seconds": point.seconds}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model in float32, in shards of about a block."""
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    load_model("smollm2-135m", dtype="float32").save_pretrained(folder, max_shard_size="20MB")
    load_tokenizer("smollm2-135m").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(folder) -> list[str]:
    """Two texts out of the packaged one."""
    from shoal.text.sources import load_documents

    documents = list(load_documents("wikipedia-sample").texts)
    files = [folder.parent / "train.txt", folder.parent / "held-out.txt"]
    for file, part in zip(files, (documents[::2], documents[1::2]), strict=True):
        file.write_text("\n\n".join(part))
    return [str(file) for file in files]


def test_a_streamed_model_is_compressed_in_less_than_its_weights(folder, texts, tmp_path):
    found = {}
    for how in ("streamed", "whole"):
        command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / how), *texts, how]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found[how] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"\n{how}: float32 weights {found[how]['weights'] / MIB:.0f} MiB, peak {found[how]['peak'] / MIB:.0f} MiB "
            f"beyond the imports; perplexity {found[how]['perplexity']:.2f}, dense {found[how]['dense']:.2f}"
        )
    # Vocabulary, windows and sums weigh more than blocks in so small a model.
    assert found["streamed"]["peak"] < found["streamed"]["weights"] < found["whole"]["peak"]
    assert found["streamed"]["perplexity"] == pytest.approx(found["whole"]["perplexity"], rel=1e-3)


# Fits and scores a model of random weights that is much larger than the rest of the process.
LARGE = """
import json, re, sys, threading
from pathlib import Path
import torch
from shoal.large.on_disk import copy_model
from shoal.measure.perplexity import evaluate
from shoal.checkpoints.load import load_model
from shoal.linearity.accumulate import measure_moments
from shoal.replace.maps import apply_replacement
from shoal.measure.targets import measure_targets
from shoal.text.windows import TokenWindows
from shoal.replace.in_order import fit_in_order

def read():
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
folder, streamed = sys.argv[1], sys.argv[2] == "streamed"
before, peak, over = read(), [0], threading.Event()

def watch():
    while not over.wait(0.01):
        peak[0] = max(peak[0], read() - before)

threading.Thread(target=watch, daemon=True).start()
model = load_model(folder, dtype="float32", streamed=streamed)
windows = TokenWindows(torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(0)), "random")
measure_moments(model, windows)
targets = measure_targets(model, windows)
student = copy_model(model)
apply_replacement(student, fit_in_order(model, (8, 9), windows, ridge=0.1))
result = evaluate(student, windows, targets)
over.set()
weights = sum(p.numel() for p in model.parameters()) * 4
print(json.dumps({"peak": peak[0], "weights": weights, "perplexity": result.perplexity}))
"""


def test_a_large_model_takes_a_fraction_of_its_weights(tmp_path):
    """The peak is of private pages beyond the imports: from loading over moments and fit to the student's perplexity."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=20, num_attention_heads=12, vocab_size=512,
        num_key_value_heads=12, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="40MB")
    found = {}
    for how in ("streamed", "whole"):
        done = subprocess.run(
            [sys.executable, "-c", LARGE, str(tmp_path / "model"), how], capture_output=True, text=True, check=True
        )
        found[how] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"\n{how}: weights {found[how]['weights'] / MIB:.0f} MiB, peak {found[how]['peak'] / MIB:.0f} MiB", flush=True
        )
    assert found["streamed"]["peak"] < 0.6 * found["streamed"]["weights"]
    assert found["whole"]["peak"] > found["whole"]["weights"]
    assert found["streamed"]["perplexity"] == pytest.approx(found["whole"]["perplexity"], rel=1e-3)
