"""Small generated probes of single skills: which of them a compressed model loses first.

Perplexity is a mean over whatever a text asks for. Here each item asks for one thing, and has one answer that follows from
its prompt: a list said again (copying), a second run of random tokens (induction, Olsson et al. 2022), a sum, or the next
word of a text, rare or common in it.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.checkpoints.load import load_tokenizer
from shoal.checkpoints.names import recipe_of
from shoal.measure.divergence import find_normalizer
from shoal.measure.perplexity import mean_and_error
from shoal.measure.task_scores import TaskResult, compare_results, load_beside
from shoal.point import TaskScore
from shoal.progress import Listener, ignore
from shoal.text.corpus import load_unseen
from shoal.text.sources import Documents
from shoal.text.windows import require_embeddings

WORDS = (
    "apple bridge candle desert engine forest garden hammer island jacket kettle ladder market needle orange pencil rabbit "
    "shadow ticket violin window basket cotton dragon flower guitar helmet lemon mirror ocean pepper river silver temple"
)
LIST_LENGTH, RUN_LENGTH, NUM_SHOTS = 8, 24, 4
# A rare word is said once or twice in the whole text; the most frequent words of four letters or more are common.
RARE_COUNT, NUM_COMMON = 2, 100
CONTEXT_CHARACTERS = 400
ITEMS_PER_PASS = 16


class Item(NamedTuple):
    """Token ids of a prompt, and of the answer that is to follow it."""

    prompt: list[int]
    answer: list[int]


class Answers(NamedTuple):
    """Of a skill's items [N]: loss of the answer in nats per token, and whether each of its tokens is the likeliest."""

    nll: Tensor
    exact: Tensor


def make_items(
    tokenizer: PreTrainedTokenizerBase, documents: Documents, *, num_items: int = 64, seed: int = 0
) -> dict[str, list[Item]]:
    """The items of every skill; the same for the same arguments.

    Raises ValueError if `documents` hold too few words to ask for.
    """
    chance = random.Random(seed)
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))

    def make(texts: Iterator[tuple[str, str]]) -> list[Item]:
        return [tokenize(tokenizer, *next(texts)) for _ in range(num_items)]

    return {
        "copying": make(_repeat_lists(chance)),
        "induction": [_repeat_run(chance, ordinary, tokenizer.bos_token_id) for _ in range(num_items)],
        "arithmetic": make(_add_numbers(chance)),
        "rare words": make(_ask_for_words(chance, documents, num_items, is_rare=True)),
        "common words": make(_ask_for_words(chance, documents, num_items, is_rare=False)),
    }


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Item:
    """The tokens of both, cut where the tokens of the whole first differ from those of the prompt alone."""
    ids, alone = tokenizer(prompt + answer)["input_ids"], tokenizer(prompt)["input_ids"]
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, alone, strict=False)))
    start = max(1, min(start, len(ids) - 1))
    return Item(ids[:start], ids[start:])


def evaluate_skills(
    name: str,
    dense: str | None,
    source: str,
    *,
    num_items: int = 64,
    seed: int = 0,
    dtype: str | None = None,
    listen: Listener = ignore,
) -> tuple[TaskScore, ...]:
    """Model `name` on every skill, beside `dense` or the dense model that its recipe names; alone if there is neither.

    Of each skill the loss of the answers in nats per token, and the share that is right in every token. Words are asked for
    from the part of text `source` that the model was not trained on. Raises ValueError for a model or text that cannot be
    used.
    """
    recipe = recipe_of(name)
    trained_on = recipe.training_texts if recipe else []
    documents = load_unseen(source, trained_on, load_tokenizer(name))
    results = []
    for model, tokenizer in load_beside(name, dense, dtype=dtype):
        skills = make_items(tokenizer, documents, num_items=num_items, seed=seed)
        highest = max(max(*item.prompt, *item.answer) for items in skills.values() for item in items)
        require_embeddings(torch.tensor(highest), model.config, tokenizer)
        results.append(measure_skills(model, skills, listen=listen))
    return compare_results(*results)


def measure_skills(model: PreTrainedModel, skills: dict[str, list[Item]], *, listen: Listener = ignore) -> list[TaskResult]:
    """The model's loss and share of right answers in every skill."""
    results = []
    for index, (skill, items) in enumerate(skills.items()):
        listen("skills", index, len(skills))
        answers = answer_items(model, items)
        for metric, values in (("loss", answers.nll), ("exact", answers.exact)):
            mean, error = mean_and_error(values)
            results.append(
                TaskResult(
                    task=skill, metric=metric, num_examples=len(items), score=mean, standard_error=error,
                    values=tuple(values.tolist()),
                )
            )  # fmt: skip
    listen("skills", len(skills), len(skills))
    return results


@torch.no_grad()
def answer_items(model: PreTrainedModel, items: Sequence[Item]) -> Answers:
    """How the model answers. Shorter items are padded at their end, which a decoder does not look at."""
    nll, exact = [], []
    for start in range(0, len(items), ITEMS_PER_PASS):
        part = items[start : start + ITEMS_PER_PASS]
        rows = [torch.tensor([*item.prompt, *item.answer]) for item in part]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        normalizer, likeliest = find_normalizer(logits)
        for row, item in enumerate(part):
            asked = slice(len(item.prompt) - 1, len(item.prompt) + len(item.answer) - 1)
            answer = torch.tensor(item.answer, device=logits.device)
            log_probs = logits[row, asked].gather(-1, answer[:, None])[:, 0].float() - normalizer[row, asked]
            nll.append(-log_probs.double().mean())
            exact.append((likeliest[row, asked] == answer).all().double())
    return Answers(torch.stack(nll).cpu(), torch.stack(exact).cpu())


def _repeat_lists(chance: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        words = ", ".join(chance.sample(WORDS.split(), LIST_LENGTH))
        yield f"The list: {words}.\nThe same list again:", f" {words}."


def _repeat_run(chance: random.Random, ordinary: Sequence[int], bos: int | None) -> Item:
    """Random tokens twice: what follows a token can only be known from its first time."""
    run = chance.sample(ordinary, RUN_LENGTH)
    return Item([*([] if bos is None else [bos]), *run, run[0]], run[1:])


def _add_numbers(chance: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        sums = [(chance.randint(1, 49), chance.randint(1, 49)) for _ in range(NUM_SHOTS + 1)]
        *shots, last = (f"{a} + {b} = {a + b}\n" for a, b in sums)
        question, equals, answer = last.partition(" =")
        yield "".join(shots) + question + equals, answer.rstrip()


def _ask_for_words(
    chance: random.Random, documents: Documents, num_items: int, *, is_rare: bool
) -> Iterator[tuple[str, str]]:
    """Words of the text with what stands before them; each from a place of its own."""
    places = [(text, match) for text in documents.texts for match in re.finditer(r"(?<= )[A-Za-z]{4,}", text)]
    counts = Counter(match.group().lower() for _, match in places)
    common = {word for word, count in counts.most_common(NUM_COMMON) if count > RARE_COUNT}
    wanted = [
        (text, match)
        for text, match in places
        if match.start() >= CONTEXT_CHARACTERS
        and (counts[match.group().lower()] <= RARE_COUNT if is_rare else match.group().lower() in common)
    ]
    if len(wanted) < num_items:
        raise ValueError(
            f"text {documents.name!r} has {len(wanted)} {'rare' if is_rare else 'common'} words with "
            f"{CONTEXT_CHARACTERS} characters before them, and {num_items} are asked for; give longer text"
        )
    for text, match in chance.sample(wanted, num_items):
        begin = match.start() - CONTEXT_CHARACTERS
        yield text[begin : match.start() - 1], f" {match.group()}"
