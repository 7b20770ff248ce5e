"""Roles never share a document, windows are whole, and leaks are found."""

from __future__ import annotations

import pytest
import torch
from conftest import make_ids, write_prose
from hypothesis import given
from hypothesis import strategies as st
from shoal.text.leakage import check_overlap
from shoal.text.sources import Documents
from shoal.text.tokenizer import train_tokenizer
from shoal.text.windows import PLACES_TO_CUT, SHARES, TokenWindows, deal_documents, find_end, make_windows

ROLES = ["calibration", "distillation", "selection", "evaluation"]


@given(
    st.lists(st.integers(1, 400), min_size=8, max_size=60),
    st.lists(st.sampled_from(ROLES), min_size=1, unique=True),
    st.booleans(),
    st.integers(0, 9),
)
def test_every_document_is_dealt_to_one_role(lengths, roles, independent, seed):
    texts = [f"{index}|".ljust(length, "x") for index, length in enumerate(lengths)]
    dealt = deal_documents(Documents("numbered", texts, independent), roles, seed=seed)
    together = [text for role in roles for text in dealt[role].texts]
    assert dealt == deal_documents(Documents("numbered", texts, independent), roles, seed=seed)
    assert all(part.independent == independent for part in dealt.values())
    if independent:
        assert sorted(together) == sorted(texts)
    else:
        assert "".join(together) == "".join(texts)


def test_shares_are_in_proportion():
    texts = [f"{index:03}" * 10 for index in range(500)]
    dealt = deal_documents(Documents("numbered", texts), ROLES)
    assert {role: len(dealt[role].texts) / 500 for role in ROLES} == pytest.approx(
        {role: SHARES[role] for role in ROLES}, abs=0.005
    )


@pytest.mark.parametrize("roles", [["evaluation"], ROLES])
def test_evaluation_text_keeps_its_order(roles):
    texts = [f"{index:03}" for index in range(100)]
    held = deal_documents(Documents("numbered", texts), roles)["evaluation"].texts
    assert held == sorted(held) and len(held) == (100 if len(roles) == 1 else 12)


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_too_few_documents_are_cut_for_all_roles(tmp_path, count, independent):
    text = write_prose(tmp_path / "prose.txt").read_text()
    texts = [text[index * len(text) // count : (index + 1) * len(text) // count] for index in range(count)]
    dealt = deal_documents(Documents("few", texts, independent), ROLES)
    assert "".join("".join(dealt[role].texts) for role in ROLES) == text
    for role in ROLES:
        assert len("".join(dealt[role].texts)) / len(text) == pytest.approx(SHARES[role], abs=0.02)
        if count == 1:
            assert "".join(dealt[role].texts).endswith("\n"), "cut at a line's end"


def test_running_text_is_cut_between_articles():
    articles = [
        f" = Title {index} = \n\n\n\n\n\n = = Part = = \n\n\n\n\n\n" + "words and words \n" * 99 for index in range(200)
    ]
    dealt = deal_documents(Documents("wiki", ["".join(articles)], independent=False), ROLES)
    assert all("".join(dealt[role].texts).startswith(" = Title ") for role in ROLES)
    assert not PLACES_TO_CUT[0].search(" = = Part = = \n")


def test_windows_are_the_text_cut_up(tokenizer):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    windows = make_windows(Documents("abc", [text[:300], text[300:]], independent=False), tokenizer, window=64)
    assert windows.ids.shape == (15, 64)
    assert tokenizer.decode(windows.ids.flatten()) == text[: 15 * 64]


def test_every_window_begins_as_the_tokenizer_begins_a_text(bos_tokenizer):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    windows = make_windows(Documents("abc", [text], independent=False), bos_tokenizer, window=64)
    assert windows.ids.shape == (1000 // 63, 64)
    assert windows.ids[:, 0].tolist() == [0] * len(windows)
    assert bos_tokenizer.decode(windows.ids[:, 1:].flatten()) == text[: len(windows) * 63]


@pytest.mark.parametrize(("num_tokens", "num_windows"), [(256, 4), (300, 4), (10, 1), (None, 15), (10**9, 15)])
def test_no_more_tokens_than_asked_for(tokenizer, num_tokens, num_windows):
    assert len(make_windows(Documents("a", ["a" * 1000]), tokenizer, window=64, num_tokens=num_tokens)) == num_windows


@pytest.mark.parametrize("texts", [[], ["short"], [""]])
def test_text_shorter_than_a_window_is_refused(tokenizer, texts):
    with pytest.raises(ValueError, match=r"text 'notes' has \d tokens, fewer than one window of 64"):
        make_windows(Documents("notes", texts), tokenizer, window=64)


def test_documents_end_and_running_text_does_not(tokenizer):
    texts = ["ab" * 40, "cd" * 40]
    one, two = (make_windows(Documents("t", texts, independent), tokenizer, window=8) for independent in (False, True))
    end = tokenizer.eos_token
    assert tokenizer.decode(one.ids.flatten()) == texts[0] + texts[1]
    assert tokenizer.decode(two.ids.flatten()) == texts[0] + end + texts[1][:-1], "whole windows alone"


def test_a_chat_tokenizer_ends_documents_as_it_was_pretrained(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert tokenizer.eos_token_id != find_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")


@pytest.mark.parametrize("num_tokens", [640, None])
def test_a_running_text_is_tokenized_as_a_whole(num_tokens, monkeypatch):
    """Also where only as much is tokenized as is wanted, and across the seams of stretches."""
    text = "".join(f" = Title {n} = \n\n\n\n\n\n The {n}th line , and more of it . \n\n\n" for n in range(400))
    learned = train_tokenizer([text], 400)
    monkeypatch.setattr("shoal.text.windows.STRETCH", 5000)
    windows = make_windows(
        Documents("t", [text[:999], text[999:]], independent=False), learned, window=64, num_tokens=num_tokens
    )
    assert windows.ids.flatten().tolist() == learned(text)["input_ids"][: windows.num_tokens]
    assert len(windows) == 10 if num_tokens else len(windows) > 100


def test_the_hash_is_of_the_tokens():
    ids = make_ids(4, 32)
    changed = ids.clone()
    changed[3, 31] += 1
    assert TokenWindows(ids, "a").sha256 == TokenWindows(ids.clone(), "b").sha256
    assert TokenWindows(ids, "a").sha256 != TokenWindows(changed, "a").sha256
    assert TokenWindows(ids, "a").take(0, 3).sha256 == TokenWindows(changed, "a").take(0, 3).sha256


@pytest.mark.parametrize(("length", "leaks"), [(60, True), (48, True), (47, False)])
@pytest.mark.parametrize("place", [0, 37])
def test_a_planted_run_is_found(length, leaks, place):
    seen, held = make_ids(8, 128, seed=1), make_ids(4, 128, seed=2)
    check_overlap([TokenWindows(seen, "seen")], [TokenWindows(held, "held")])
    held[2, place : place + length] = seen[5, 50 : 50 + length]
    held[2, place + length] = 0
    if leaks:
        message = f"'held' overlaps 'seen', .*: {length - 47} of {4 * (128 - 47)} runs of 48 tokens"
        with pytest.raises(ValueError, match=message):
            check_overlap(
                [TokenWindows(make_ids(2, 128, seed=3), "clean"), TokenWindows(seen, "seen")], [TokenWindows(held, "held")]
            )
    else:
        check_overlap([TokenWindows(seen, "seen")], [TokenWindows(held, "held")])


def test_equal_windows_overlap_however_short():
    windows = TokenWindows(torch.arange(8)[None], "same")
    with pytest.raises(ValueError, match="1 of 1 runs of 8 tokens"):
        check_overlap([windows], [windows])
