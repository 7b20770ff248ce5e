"""A model learns from nothing, resumes, learns the same on two ranks, and is an ordinary model afterwards."""

from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import write_prose
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.distil.descent import Diverged
from shoal.linearity.accumulate import measure_moments
from shoal.linearity.scores import score_blocks
from shoal.paper.pretrain import PretrainingRun, make_model, save_model
from shoal.paper.pretrain_corpus import PretrainCorpus, load_pretrain_corpus
from shoal.paper.pretrain_recipe import Architecture, Pretraining, PretrainRecipe, PretrainTexts, Regularizer
from shoal.text.corpus import load_corpus
from shoal.text.tokenizer import train_tokenizer
from shoal.texts import Texts

ARCHITECTURE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
SIZES = {"vocab_size": 300, "validation_tokens": 1024, "linearity_tokens": 1024}


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> Path:
    return write_prose(tmp_path_factory.mktemp("text") / "prose.txt")


def make_recipe(prose: Path, *, num_steps: int = 12, kind="none", weight=0.0, seed=0, texts=None, **training):
    given = {"window": 32, "windows_per_step": 8, "windows_per_pass": 8, "num_checks": 3, "learning_rate": 1e-2, **training}
    return PretrainRecipe(
        architecture=Architecture(**ARCHITECTURE),
        texts=PretrainTexts(**{"train": str(prose), "validation": str(prose), **SIZES, **(texts or {})}),
        training=Pretraining(num_tokens=num_steps * given["window"] * given["windows_per_step"], **given),
        dtype="float32", regularizer=Regularizer.of(kind, weight), seed=seed,
    )  # fmt: skip


@pytest.fixture(scope="module")
def read(prose) -> tuple[PretrainCorpus, object]:
    return load_pretrain_corpus(make_recipe(prose))


def make_run(read, recipe: PretrainRecipe) -> PretrainingRun:
    corpus, tokenizer = read
    return PretrainingRun(make_model(recipe, tokenizer), corpus, recipe)


def weights_of(run: PretrainingRun) -> list[torch.Tensor]:
    return [p.detach() for p in run.model.parameters()]


@pytest.mark.parametrize(("kind", "weight"), [("none", 0), ("cosine", 0.5), ("mse", 2.0)])
def test_loss_and_perplexity_go_down(read, prose, kind, weight):
    run = make_run(read, make_recipe(prose, kind=kind, weight=weight))
    metrics = list(run)
    steps = metrics[1:]
    assert [one["step"] for one in metrics] == list(range(13))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(one["loss"] == pytest.approx(one["lm_loss"] + one["penalty"]) for one in steps)
    assert all((one["penalty"] > 0) == (weight > 0) for one in steps)
    assert [check["step"] for check in run.checks] == [0, 4, 8, 12]
    assert run.checks[-1]["validation_perplexity"] < 0.9 * run.checks[0]["validation_perplexity"]


def test_before_it_learned_a_model_is_as_good_as_chance(read, prose):
    first = next(iter(make_run(read, make_recipe(prose))))
    assert first["validation_perplexity"] == pytest.approx(len(read[1]), rel=0.05)


def test_at_weight_0_the_loss_is_the_language_models(read, prose):
    run = make_run(read, make_recipe(prose))
    ids = read[0].training.ids[:4]
    losses = run._find_losses(torch.arange(4))
    expected = run.model(input_ids=ids, labels=ids).loss
    assert losses.tolist() == pytest.approx([float(expected), 0.0], rel=1e-5)
    ours = torch.autograd.grad(losses.sum(), list(run.model.parameters()))
    theirs = torch.autograd.grad(expected, list(run.model.parameters()))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-6)


def test_checkpointed_gradients_learn_the_same(read, prose):
    recipe = make_recipe(prose, kind="cosine", weight=0.5)
    training = recipe.training.model_copy(update={"gradient_checkpointing": True})
    recipes = (recipe, recipe.model_copy(update={"training": training}))
    plain, checkpointed = ([one["loss"] for one in make_run(read, each) if "loss" in one] for each in recipes)
    assert checkpointed == pytest.approx(plain, rel=1e-4)


def test_a_strong_regulariser_makes_neighbouring_states_more_alike(read, prose):
    plain, strong = (make_run(read, make_recipe(prose, kind="cosine", weight=weight)) for weight in (0, 20))
    for run in (plain, strong):
        list(run)
    assert strong.checks[0]["mean_cosine"] == plain.checks[0]["mean_cosine"], "one seed, one beginning"
    assert strong.checks[-1]["mean_cosine"] > plain.checks[-1]["mean_cosine"] + 0.02


def test_the_recorded_linearity_is_that_of_the_model(read, prose):
    run = make_run(read, make_recipe(prose, num_steps=3, num_checks=1))
    list(run)
    scores = score_blocks(measure_moments(run.model, read[0].linearity))
    for field in ("score", "score_without_residual", "held_out", "held_out_without_residual"):
        assert run.checks[-1][f"mean_{field}"] == pytest.approx(sum(getattr(s, field) for s in scores) / len(scores))


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(read, prose, stop):
    recipe = make_recipe(prose, kind="cosine", weight=0.5, num_steps=8)
    whole, first, second = (make_run(read, recipe) for _ in range(3))
    metrics = list(whole)
    list(itertools.islice(first, 1 + stop))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert list(second) == metrics[1 + stop :]
    assert second.checks == whole.checks and second.blocks == whole.blocks
    assert all(torch.equal(p, q) for p, q in zip(weights_of(second), weights_of(whole), strict=True))


def train_on_rank(rank: int, world: int, folder: Path, prose: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    recipe = make_recipe(prose, kind="mse", weight=2.0, num_steps=4, windows_per_step=3, num_checks=1)
    run = make_run(load_pretrain_corpus(recipe), recipe)
    torch.save(([m.get("loss", 0.0) for m in run], weights_of(run)), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(read, prose, tmp_path):
    torch.multiprocessing.spawn(train_on_rank, (2, tmp_path, prose), nprocs=2)
    recipe = make_recipe(prose, kind="mse", weight=2.0, num_steps=4, windows_per_step=3, num_checks=1)
    alone = make_run(read, recipe)
    expected = [m.get("loss", 0.0) for m in alone]
    for rank in range(2):
        losses, weights = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert losses == pytest.approx(expected, rel=1e-4)
        for p, q in zip(weights, weights_of(alone), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)


def test_the_seed_decides_weights_and_order_and_the_regulariser_neither(read, prose):
    state = torch.random.get_rng_state()
    recipes = [make_recipe(prose, seed=s, kind=kind, weight=1.0) for s, kind in ((1, "mse"), (1, "cosine"), (2, "mse"))]
    runs = [make_run(read, recipe) for recipe in recipes]
    assert torch.equal(torch.random.get_rng_state(), state)
    same = [all(torch.equal(p, q) for p, q in zip(weights_of(runs[0]), weights_of(run), strict=True)) for run in runs]
    orders = [run.descent.rows_of_step(0).tolist() for run in runs]
    assert same == [True, True, False]
    assert orders[0] == orders[1] != orders[2]


def test_an_absurd_learning_rate_diverges(read, prose):
    with pytest.raises(Diverged, match=r"of 12 with learning_rate=1e\+30.*use a lower learning rate"):
        list(make_run(read, make_recipe(prose, learning_rate=1e30, kind="mse", weight=1.0)))


def test_norms_do_not_decay(read, prose):
    groups = make_run(read, make_recipe(prose)).descent.optimizer.param_groups
    assert [(group["weight_decay"], {p.dim() for p in group["params"]}) for group in groups] == [(0.1, {2}), (0.0, {1})]


def test_a_saved_model_is_an_ordinary_one(read, prose, tmp_path):
    corpus, tokenizer = read
    recipe = make_recipe(prose, num_steps=2)
    run = make_run(read, recipe)
    list(run)
    folder = tmp_path / "deep" / "model"
    save_model(folder, run, tokenizer, recipe)
    model, again = load_model(str(folder), dtype="float32"), load_tokenizer(str(folder))
    ids = corpus.validation.ids[:2]
    torch.testing.assert_close(model(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits, rtol=0, atol=1e-6)
    assert model.config.model_type == "mistral"
    assert again("naïve 鱼")["input_ids"] == tokenizer("naïve 鱼")["input_ids"]
    told = json.loads((folder / "pretraining.json").read_text())
    assert PretrainRecipe.model_validate(told["recipe"]) == recipe and told["checks"] == run.checks
    # What compression evaluates on was not trained on.
    texts = Texts(train=str(prose), evaluation=str(prose), window=32, calibration_tokens=1024)
    later = load_corpus(texts, again, model.config)
    seen = {tuple(row) for row in corpus.training.ids.unfold(1, 8, 1).flatten(0, 1).tolist()}
    assert not any(tuple(row) in seen for row in later.evaluation[0].ids.unfold(1, 8, 1).flatten(0, 1).tolist())


def test_windows_survive_the_disk(read, tmp_path):
    read[0].save(tmp_path / "corpus.safetensors")
    again = PretrainCorpus.load(tmp_path / "corpus.safetensors")
    assert [windows.sha256 for windows in vars(again).values()] == [windows.sha256 for windows in vars(read[0]).values()]


def test_a_tokenizer_gives_back_what_it_read():
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 5, 270)
    text = "the mat ☃ sat\n\t«naïve»"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the")["input_ids"]) == 1, "a merge"
    assert 258 < len(tokenizer) <= 270
    assert tokenizer("a<|end|>b")["input_ids"][1] == tokenizer.eos_token_id


def test_a_given_tokenizer_is_used(prose, tiny_random):
    recipe = make_recipe(prose, texts={"tokenizer": tiny_random})
    corpus, tokenizer = load_pretrain_corpus(recipe)
    assert len(tokenizer) == 257 == make_model(recipe, tokenizer).config.vocab_size
    assert int(corpus.training.ids.max()) < 257


@pytest.mark.parametrize(
    ("texts", "training", "complaint"),
    [
        ({}, {"windows_per_step": 10_000}, r"windows of 32 tokens to train on, fewer than .*windows_per_step=10000"),
        ({"linearity_tokens": 128}, {}, r"128 tokens to measure linearity on are too few.*linearity_tokens of 256"),
        ({"validation_tokens": 32}, {}, r"fills 1 window for validation; a standard error needs 2"),
        ({"train": "nowhere.txt"}, {}, r"text file 'nowhere.txt' does not exist"),
    ],
)
def test_texts_that_are_too_short_are_refused(prose, texts, training, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_pretrain_corpus(make_recipe(prose, texts=texts, **training))


def test_validation_text_that_was_trained_on_is_refused(prose, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text(prose.read_text())
    with pytest.raises(ValueError, match=r"evaluation text 'copy.txt' overlaps 'prose.txt'"):
        load_pretrain_corpus(make_recipe(prose, texts={"validation": str(copy)}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_attention_heads": 3}, "hidden_size=16 is no multiple of num_attention_heads=3"),
        ({"num_key_value_heads": 4}, "num_attention_heads=2 is no multiple of num_key_value_heads=4"),
    ],
)
def test_heads_must_divide(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        Architecture(**{**ARCHITECTURE, **changes})


def test_a_window_beyond_the_context_is_refused(prose):
    with pytest.raises(ValueError, match=r"training.window=64 is longer than architecture.max_position_embeddings=32"):
        make_recipe(prose, window=64)


def test_perplexity_is_the_exponential_of_the_loss(read, prose):
    run = make_run(read, make_recipe(prose, num_steps=1))
    *_, last = run
    with torch.no_grad():
        ids = read[0].validation.ids
        loss = float(run.model.eval()(input_ids=ids, labels=ids).loss)
    assert last["validation_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
