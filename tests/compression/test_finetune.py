"""Labelled texts, and decoders fine-tuned on them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from shoal.checkpoints.load import load_model, load_tokenizer
from shoal.linearity.profile import profile_model
from shoal.paper.finetune import Collator, Finetuning, FinetuningRun, ScoredDecoder
from shoal.text.labelled import Labelled, Preferences, load_labelled, load_preferences
from shoal.texts import Texts
from shoal_services.finetuning.results import MEASURES

SHOAL = Path(sys.executable).with_name("shoal")
FAST = Finetuning(learning_rate=3e-3, num_epochs=3, batch_size=16, max_length=32)


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def make_labelled(count: int = 160) -> Labelled:
    """A text is positive if it ends with "!": easy to learn for a model of bytes."""
    rng = random.Random(0)
    labels = [rng.randrange(2) for _ in range(count)]
    texts = ["".join(rng.choices("abcdefgh ", k=12)) + "?!"[label] for label in labels]
    return Labelled("ends", texts, labels, ["no", "yes"])


def make_preferences(count: int = 160) -> Preferences:
    texts = make_labelled(count).texts
    return Preferences("ends", [text[:-1] + "!" for text in texts], [text[:-1] + "?" for text in texts])


@pytest.mark.parametrize("examples", [make_labelled(), make_preferences()], ids=["classes", "pairs"])
@pytest.mark.parametrize("trained", ["all", "lora"])
def test_what_can_be_learned_is_learned(examples: Labelled | Preferences, trained: str, tmp_path: Path):
    model, tokenizer = load_model("tiny-random", dtype="float32"), load_tokenizer("tiny-random")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    settings = FAST.model_copy(update={"trained": trained})
    run = FinetuningRun(model, tokenizer, examples.split(0.25), settings, folder=tmp_path / "run")
    run.train()
    measured = run.measure_accuracy()
    assert measured["accuracy"] > 0.9 and measured["num_held_out"] == 40
    tuned = dict(run.finish().named_parameters())
    run.save(tmp_path / "model")
    again = load_model(str(tmp_path / "model"), dtype="float32")
    for name, weight in again.named_parameters():
        torch.testing.assert_close(weight, tuned[name])
    assert any(not torch.equal(weight, before[name]) for name, weight in again.named_parameters())


def test_labels_of_chance_are_not_learned(tmp_path: Path):
    examples = make_labelled(200)
    random.Random(1).shuffle(examples.labels)
    model, tokenizer = load_model("tiny-random", dtype="float32"), load_tokenizer("tiny-random")
    run = FinetuningRun(model, tokenizer, examples.split(0.5), FAST, folder=tmp_path)
    run.train()
    measured = run.measure_accuracy()
    assert abs(measured["accuracy"] - 0.5) < 4 * measured["accuracy_standard_error"]


def test_padding_changes_nothing():
    model, tokenizer = load_model("tiny-random", dtype="float32"), load_tokenizer("tiny-random")
    scored = ScoredDecoder(model, 2).eval()
    collate = Collator(tokenizer, 32)
    rows = [(("short",), 0), (("a much longer text than that",), 1)]
    together = scored(**collate(rows))["logits"]
    alone = torch.cat([scored(**collate([row]))["logits"] for row in rows])
    torch.testing.assert_close(together, alone)


def test_of_a_long_text_the_end_is_kept():
    tokenizer = load_tokenizer("tiny-random")
    batch = Collator(tokenizer, 8)([(("0123456789abcdef",), 0)])
    assert tokenizer.decode(batch["input_ids"][0]) == "89abcdef"


def test_several_columns_become_lines(tmp_path: Path):
    rows = [{"question": f"q{i}", "passage": f"p{i}", "answer": bool(i % 2)} for i in range(6)]
    source = write_rows(tmp_path / "boolq.jsonl", rows)
    labelled = load_labelled(source, text_columns=["question", "passage"], label_column="answer")
    assert labelled.texts[1] == "question: q1\npassage: p1"
    assert labelled.classes == ["False", "True"] and labelled.labels == [0, 1] * 3


def test_the_prompt_stands_before_both_answers(tmp_path: Path):
    rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "5"}] * 4
    preferences = load_preferences(write_rows(tmp_path / "pairs.jsonl", rows))
    assert preferences.chosen[0] == "2+2=4" and preferences.rejected[0] == "2+2=5"


@pytest.mark.parametrize("prompt", ["2+2=", [{"role": "user", "content": "2+2="}]])
@pytest.mark.parametrize("is_repeated", [True, False])
def test_preferences_between_conversations_are_written_as_the_model_reads_them(tmp_path, tiny_random, prompt, is_repeated):
    tokenizer = load_tokenizer(tiny_random)
    before = [{"role": "user", "content": "2+2="}] if is_repeated and isinstance(prompt, str) else []
    answers = {name: [*before, {"role": "assistant", "content": a}] for name, a in (("chosen", "4"), ("rejected", "5"))}
    source = write_rows(tmp_path / "pairs.jsonl", [{"prompt": prompt, **answers}] * 4)
    with pytest.raises(ValueError, match="row 1: it is a conversation, and the model's tokenizer has no chat template"):
        load_preferences(source, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    preferences = load_preferences(source, tokenizer)
    assert (preferences.chosen[0], preferences.rejected[0]) == ("<user>2+2=<assistant>4", "<user>2+2=<assistant>5")


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"text": "a", "label": 1}] * 8, {}, "1 classes"),
        ([{"text": "a", "label": 1}] * 8, {"label_column": "answer"}, "no column 'answer'; it has text, label"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 1}], {}, "2 rows: too few"),
        ([{"text": "a", "label": i} for i in range(80)], {}, "80 classes"),
        ([{"text": "a", "label": 0}] * 4 + [{"text": " ", "label": 1}], {}, "row 5, has no text"),
        ([{"text": "a", "label": 0}] * 4 + [{"text": 7, "label": 1}], {}, "row 5: 'text' is '7', and no text"),
        ([{"text": "a", "label": 0}] * 4 + [{"text": "b", "label": None}], {}, "row 5, has no 'label'"),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused(rows: list[dict], options: dict, said: str, tmp_path: Path):
    with pytest.raises(ValueError, match=said):
        load_labelled(write_rows(tmp_path / "data.jsonl", rows), **options)


def test_a_part_with_one_class_is_refused():
    one_sided = Labelled("rare", ["a"] * 20, [0] * 19 + [1], ["no", "yes"])
    with pytest.raises(ValueError, match="a part has one class"):
        one_sided.split(0.2)


def test_a_batch_that_workers_cannot_share_is_refused(tmp_path: Path):
    model, tokenizer = load_model("tiny-random", dtype="float32"), load_tokenizer("tiny-random")
    with pytest.raises(ValueError, match="batch_size=16 is no multiple of the 3 workers"):
        FinetuningRun(model, tokenizer, make_labelled().split(0.2), FAST, folder=tmp_path, world_size=3)


@pytest.mark.slow
def test_linearity_before_and_after_over_seeds(tmp_path: Path, tiny_random: str):
    labelled = make_labelled(64)
    rows = [{"text": t, "label": label} for t, label in zip(labelled.texts, labelled.labels, strict=True)]
    data = write_rows(tmp_path / "ends.jsonl", rows)
    command = [
        str(SHOAL), "finetune", tiny_random, "--data", data, "--num-seeds", "2", "--num-cpus", "2",
        "--storage", str(tmp_path), "--name", "ends", "--window", "128", "--calibration-tokens", "8192", "--json",
        "--learning-rate", "0.003", "--dtype", "float32", "--max-length", "32",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [seed["assignment"]["seed"] for seed in told["seeds"]] == [0, 1]
    assert told["seeds"][0]["held_out_loss"] != told["seeds"][1]["held_out_loss"]
    for field in MEASURES:
        assert told["change"][field]["mean"] != 0 and told["change"][field]["standard_error"] > 0
    texts = Texts(calibration_tokens=8192, window=128)
    (profiled,) = profile_model(told["seeds"][0]["model"], texts, dtype="float32")
    assert profiled.mean("score") == pytest.approx(fmean(block["score"] for block in told["seeds"][0]["blocks"]), abs=1e-9)
    assert (tmp_path / "ends" / "linearity.html").stat().st_size > 10_000
    again = subprocess.run([*command, "--num-epochs", "2"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 1 and "finetuning differ" in again.stderr
