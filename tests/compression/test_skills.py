"""A skill's items have one answer; a model that knows it has no loss, and the loss is that of plain cross-entropy."""

from __future__ import annotations

import random
import re

import pytest
import torch
from shoal.paper.skills import WORDS, Item, answer_items, evaluate_skills, make_items, measure_skills, tokenize
from shoal.text.sources import Documents

SKILLS = ["copying", "induction", "arithmetic", "rare words", "common words"]


@pytest.fixture(scope="module")
def documents() -> Documents:
    """Text of 36 words, with words in it that are said once."""
    chance = random.Random(1)
    words = [chance.choice(WORDS.split()) for _ in range(3000)]
    words[::30] = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in words[::30]]
    return Documents("words", [" ".join(words[start : start + 500]) for start in range(0, len(words), 500)])


def test_items_are_the_same_every_time_and_of_their_kind(tokenizer, documents):
    items, again = (make_items(tokenizer, documents, num_items=8) for _ in range(2))
    assert list(items) == SKILLS and items == again
    assert items != make_items(tokenizer, documents, num_items=8, seed=1)
    for prompt, answer in items["induction"]:
        run = prompt[-1:] + answer
        assert prompt[-1 - len(run) : -1] == run, "the answer is what followed before"
    for prompt, answer in items["arithmetic"]:
        question = tokenizer.decode(prompt).splitlines()[-1]
        a, b = map(int, re.findall(r"\d+", question)[:2])
        assert re.findall(r"\d+", question + tokenizer.decode(answer))[-1] == str(a + b)
    for prompt, answer in items["copying"]:
        said = tokenizer.decode([*prompt, *answer])
        listed = re.findall(r"(?:list|again): ?([a-z, ]+)\.", said)
        assert len(listed) == 2 and listed[0].split(", ") == listed[1].split(", ")


def test_words_are_rare_or_common_in_the_text(tokenizer, documents):
    words = re.findall(r"[A-Za-z]{4,}", " ".join(documents.texts).lower())
    items = make_items(tokenizer, documents, num_items=8)
    counts = {
        skill: [words.count(tokenizer.decode(answer).strip().lower()) for _, answer in items[skill]]
        for skill in ("rare words", "common words")
    }
    assert max(counts["rare words"]) <= 2 < min(counts["common words"])


def test_too_few_rare_words_are_counted(tokenizer):
    with pytest.raises(ValueError, match=r"'thin' has 0 rare words .* 4 are asked for"):
        make_items(tokenizer, Documents("thin", ["water under water " * 100]), num_items=4)


@pytest.mark.parametrize(("prompt", "answer"), [("One, two", ", three"), ("a", " b"), ("12 + 5 =", " 17"), ("", "word")])
def test_prompt_and_answer_are_the_tokens_of_the_whole(tokenizer, prompt, answer):
    item = tokenize(tokenizer, prompt, answer)
    assert item.prompt + item.answer == tokenizer(prompt + answer)["input_ids"]
    assert item.answer and (item.prompt or not prompt)


def test_the_loss_is_that_of_each_item_alone(model):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 128, (length,), generator=generator).tolist() for length in (12, 7, 20)]
    items = [Item(row[:cut], row[cut:]) for row, cut in zip(ids, (9, 1, 15), strict=True)]
    found = answer_items(model, items)
    for index, item in enumerate(items):
        logits = model(input_ids=torch.tensor([ids[index]]), use_cache=False).logits[0, len(item.prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(item.answer))
        assert float(found.nll[index]) == pytest.approx(float(loss), rel=1e-4)
        assert found.exact[index] == float((logits.argmax(-1) == torch.tensor(item.answer)).all())


def test_a_model_that_gives_the_likeliest_token_is_exact(llama):
    row = llama.generate(torch.tensor([[5, 9, 2]]), max_new_tokens=4, do_sample=False, eos_token_id=None)[0].tolist()
    (loss, exact) = measure_skills(llama, {"greedy": [Item(row[:3], row[3:]), Item(row[:3], row[3:])]})
    assert exact.score == 1 and loss.score > 0 and loss.num_examples == 2


def test_the_dense_model_beside_itself_differs_by_nothing(tiny_random, documents, tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("\n".join(documents.texts), encoding="utf-8")
    scores = evaluate_skills(tiny_random, tiny_random, str(path), num_items=4)
    assert [score.task for score in scores] == [skill for skill in SKILLS for _ in ("loss", "exact")]
    assert all(score.difference == 0 and score.difference_standard_error == 0 for score in scores)
