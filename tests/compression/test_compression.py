"""The story, end to end: a recipe goes in, a folder comes out that evaluates to the numbers it shows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import shoal
import transformers
from conftest import write_prose
from pydantic import ValidationError
from shoal.checkpoints.hashes import hash_weights
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.checkpoints.store import load_point
from shoal.measure.beside import evaluate_beside
from shoal.measure.perplexity import evaluate
from shoal.measure.targets import measure_targets
from shoal.models.projections import find_zeros
from shoal.recipe import KINDS
from shoal.text.corpus import load_corpus
from shoal.texts import Texts

DISTILLATION = {"num_tokens": 2048, "window": 64, "windows_per_step": 4, "lora_rank": 4, "learning_rate": 1e-3}
WITHOUT_MAPS = ("folded", "dropped")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Texts:
    name = str(write_prose(tmp_path_factory.mktemp("text") / "prose.txt", num_sentences=3000))
    return Texts(
        train=(name,), evaluation=(name,), window=64, calibration_tokens=8192, evaluation_tokens=2048, selection_tokens=1024
    )


def evaluate_again(folder, texts: Texts, base_model: str, *, distillation_tokens: int = 0):
    """The folder's model beside the dense one, from nothing but the folder, the model's name and the texts."""
    dense, model = load_model(base_model, dtype="float32"), shoal.load(folder, dtype="float32")
    corpus = load_corpus(
        texts, load_tokenizer(str(folder)), dense.config, distillation_tokens=distillation_tokens, distillation_window=64
    )
    return evaluate(model, corpus.evaluation[0], measure_targets(dense, corpus.evaluation[0]))


@pytest.mark.parametrize("shared", [False, True])
def test_evaluating_a_folder_takes_the_tokens_that_compressing_took(tiny_random, texts, tmp_path, shared):
    """Of a text that was trained on the part kept for evaluation; of any other text all of it."""
    other = str(write_prose(tmp_path / "other.txt", num_sentences=800, seed=9))
    texts = texts if shared else texts.model_copy(update={"evaluation": (other,)})
    point = shoal.compress(tiny_random, tmp_path / "out", texts=texts, num_replaced=1, dtype="float32")
    (again,) = evaluate_beside(str(tmp_path / "out"), None, texts, dtype="float32")
    assert again.text == point.evaluations[0].text
    assert again.perplexity == pytest.approx(point.perplexity, rel=1e-4)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_evaluates_to_its_numbers(tiny_random, texts, tmp_path, kind, distilled):
    folder, rank = tmp_path / "out", 4 if kind == "low_rank" else None
    distillation = {**DISTILLATION, "trained": "lora" if kind in WITHOUT_MAPS else "maps"} if distilled else None
    point = shoal.compress(
        tiny_random, folder, texts=texts, num_replaced=2, kind=kind, rank=rank, distillation=distillation, dtype="float32"
    )
    assert load_point(folder) == point
    again = evaluate_again(folder, texts, tiny_random, distillation_tokens=2048 if distilled else 0)
    (stored,) = point.evaluations
    assert again.text == stored.text
    for name in ("perplexity", "dense_perplexity", "standard_error", "kl"):
        assert getattr(again, name) == pytest.approx(getattr(stored, name), rel=1e-4)
    assert 1 < stored.dense_perplexity < stored.perplexity * 1.1 < 400
    assert len(point.recipe.blocks) == 2
    assert {0, 5}.isdisjoint(point.recipe.blocks)
    assert point.recipe.weights_sha256 == hash_weights(load_model(tiny_random, dtype="float32"))
    assert point.size.num_parameters < point.dense_size.num_parameters
    assert point.size.kv_bytes_per_token * 6 == point.dense_size.kv_bytes_per_token * 4
    assert (point.recipe.distillation_text is not None) == distilled
    if kind in WITHOUT_MAPS:
        assert type(transformers.AutoModelForCausalLM.from_pretrained(folder)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("selection", ["cosine", "window", "kl"])
def test_every_selection_runs(tiny_random, texts, tmp_path, selection):
    point = shoal.compress(
        tiny_random, tmp_path / "out", texts=texts, num_replaced=2, selection=selection, fit="independent"
    )
    assert len(point.recipe.blocks) == 2


def test_the_same_recipe_gives_the_same_weights(tiny_random, texts, tmp_path):
    """And the recipe in the folder is enough to make it again: the blocks chosen are listed there."""
    first = shoal.compress(tiny_random, tmp_path / "first", texts=texts, num_replaced=2, distillation=DISTILLATION)
    second = shoal.compress(**{**first.recipe.model_dump(), "num_replaced": 2}, folder=tmp_path / "second", texts=texts)
    assert second.recipe == first.recipe.model_copy(update={"selection": second.recipe.selection})
    assert second.artefact_sha256 == first.artefact_sha256


def test_nothing_replaced_is_the_dense_model(tiny_random, texts, tmp_path):
    point = shoal.compress(tiny_random, tmp_path / "out", texts=texts, num_replaced=0, dtype="float32")
    assert point.evaluations[0].kl == pytest.approx(0, abs=1e-6)
    assert point.evaluations[0].log_ratio == pytest.approx(0, abs=1e-6)
    assert point.size == point.dense_size
    dense, same = (load_model(name, dtype="float32") for name in (tiny_random, str(tmp_path / "out")))
    assert hash_weights(same) == hash_weights(dense)


def test_listed_blocks_need_no_number(tiny_random, texts, tmp_path):
    point = shoal.compress(tiny_random, tmp_path / "out", texts=texts, blocks=[4, 2])
    assert point.recipe.blocks == (2, 4)
    assert point.recipe.num_replaced == 2


def test_stages_are_heard_and_timed(tiny_random, texts, tmp_path):
    from shoal.compression import compress
    from shoal.recipe import Recipe

    heard: list[tuple[str, int, int]] = []
    recipe = Recipe(base_model=tiny_random, num_replaced=1, distillation=DISTILLATION)
    point = compress(recipe, tmp_path / "out", texts=texts, listen=lambda *call: heard.append(call))
    # Of one finalist nothing has to be heard.
    assert list(dict.fromkeys(stage for stage, _, _ in heard if stage != "finalists")) == [
        "load",
        "moments",
        "dense model",
        "choose",
        "fit",
        "distil",
        "evaluate",
    ]
    for stage in dict(heard := [(stage, (done, total)) for stage, done, total in heard]):
        done, total = [progress for name, progress in heard if name == stage][-1]
        assert done == total, stage
    assert list(point.seconds) == ["load", "prepare", "fit", "distil", "evaluate", "store"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"num_replaced": 5}, "more than the 4 replaceable blocks of 6"),
        ({"blocks": [6]}, r"blocks \[6\] do not exist"),
        ({"blocks": [0], "kind": "folded"}, "block 0 has no block before it"),
        ({"num_replaced": 1, "kind": "low_rank", "rank": 65}, "rank=65 is more than the hidden size 64"),
        (
            {"num_replaced": 1, "kind": "dropped", "distillation": {**DISTILLATION, "trained": "maps"}},
            "leaves no maps to train",
        ),
        ({"num_replaced": 1, "distillation": {**DISTILLATION, "window": 1024}}, "window=1024 is longer"),
        ({"num_replaced": 1, "dtype": "int4"}, "dtype='int4' is not known"),
    ],
)
def test_what_cannot_be_made_is_refused_and_leaves_nothing(tiny_random, texts, tmp_path, recipe, message):
    with pytest.raises(ValueError, match=message):
        shoal.compress(tiny_random, tmp_path / "out", texts=texts, **recipe)
    assert not list(tmp_path.iterdir())


def test_a_misspelt_keyword_is_refused_by_name(tiny_random, tmp_path):
    with pytest.raises(ValidationError, match="num_pruned"):
        shoal.compress(tiny_random, tmp_path / "out", num_pruned=2, num_replaced=2)


def test_an_existing_folder_is_refused_before_any_work(tmp_path):
    with pytest.raises(FileExistsError, match="choose another folder"):
        shoal.compress("no-such/model", tmp_path, num_replaced=1)


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import shoal, shoal.recipe, shoal.frontier", {"torch", "transformers", "ray", "mlflow", "fastapi"}),
        ("import shoal.compression", {"ray", "mlflow", "fastapi", "gensim", "datasets", "peft"}),
    ],
)
def test_the_library_does_not_know_the_cluster(code, absent):
    found = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*{absent} & set(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == []


@pytest.mark.parametrize("trained", ["lora", "all"])
def test_zeros_and_factors_are_in_the_folder_and_counted(tiny_random, texts, tmp_path, trained):
    """After distillation too; no block needs to be replaced. The folder evaluates to the numbers that it shows."""
    point = shoal.compress(
        tiny_random, tmp_path / "out", texts=texts, num_replaced=0, weight_share=0.8, sparsity="2:4", dtype="float32",
        distillation={**DISTILLATION, "trained": trained},
    )  # fmt: skip
    model = shoal.load(tmp_path / "out", dtype="float32")
    zeros = find_zeros(model)
    assert all((zero.view(len(zero), -1, 4).sum(-1) == 2).all() for zero in zeros.values())
    num_zeros, stored = (sum(int(n) for n in ns) for ns in (
        (zero.sum() for zero in zeros.values()), (p.numel() for p in model.parameters())
    ))  # fmt: skip
    assert point.size.num_parameters == stored - num_zeros
    assert point.size.num_bytes == 4 * stored < point.dense_size.num_bytes
    assert point.size.num_bitmask_bytes == 4 * (stored - num_zeros) + sum(zero.numel() // 8 for zero in zeros.values())
    assert 0 <= (tmp_path / "out" / "model.safetensors").stat().st_size - point.size.num_bytes < 20_000
    again = evaluate_again(tmp_path / "out", texts, tiny_random, distillation_tokens=2048)
    assert again.perplexity == pytest.approx(point.perplexity, rel=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"| bytes, if zeros were a bit each | {point.dense_size.num_bytes:,} | {point.size.num_bitmask_bytes:,} |" in card
    )
    assert "# tiny-random, SVD 80 %, 2:4 sparse" in card and "trust_remote_code=True" in card
