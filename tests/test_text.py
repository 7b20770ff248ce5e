"""Sources are read, roles never share a document, windows are whole, and leaks are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_ids, write_prose
from hypothesis import given
from hypothesis import strategies as st
from shoal.text import (
    PACKAGED_TEXT,
    SHARES,
    Documents,
    TokenWindows,
    check_overlap,
    deal_documents,
    load_documents,
    make_windows,
)

PAGES = ["One page.", "Another page, in ünïcode.", "  \n ", "The last."]
ROLES = ["calibration", "distillation", "selection", "evaluation"]


def write_jsonl(path: Path, **columns: list) -> str:
    path.write_text(
        "\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))
    )
    return str(path)


def test_a_text_file_is_read_in_pieces_in_order(tmp_path):
    file = write_prose(tmp_path / "prose.txt")
    documents = load_documents(str(file))
    assert "".join(documents.texts) == file.read_text()
    assert len(documents.texts) > 5
    assert not documents.independent
    assert documents.name == "prose.txt"


@pytest.mark.parametrize("column", ["text", "content", "whatever"])
def test_jsonl_documents_that_hold_text(tmp_path, column):
    documents = load_documents(write_jsonl(tmp_path / "pages.jsonl", **{column: PAGES, "page": [1, 2, 3, 4]}))
    assert documents.texts == [PAGES[0], PAGES[1], PAGES[3]]
    assert documents.independent


def test_parquet_documents_that_hold_text(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"title": ["a", "b", "c"], "text": [PAGES[0], None, PAGES[1]]}).to_parquet(tmp_path / "pages.parquet")
    assert load_documents(str(tmp_path / "pages.parquet")).texts == PAGES[:2]


def test_the_packaged_sample_is_prose():
    documents = load_documents(PACKAGED_TEXT)
    assert len(documents.texts) > 50
    assert all("{{" not in text and "[[" not in text for text in documents.texts)
    assert sum(map(len, documents.texts)) > 500_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist; check the path"),
        ("missing.jsonl", None, "does not exist; check the path"),
        ("empty.txt", "", "holds no text"),
        ("blank.txt", " \n\n ", "holds no text"),
        ("empty.jsonl", "", "holds no text"),
        ("blank.jsonl", '{"text": ""}\n{"text": null}\n', "holds no text"),
        ("broken.jsonl", "{not json", "damaged or no .jsonl"),
        ("broken.parquet", "garbage", "damaged or no .parquet"),
        ("numbers.jsonl", '{"n": 3}\n', r"has the text columns \[\]: rename the one to use to 'text'"),
        ("unclear.jsonl", '{"a": "x", "b": "y"}\n', r"text columns \['a', 'b'\]"),
    ],
)  # fmt: skip
def test_files_without_text_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_documents(str(tmp_path / name))


@pytest.mark.parametrize("source", ["no-such/dataset", "no-such/dataset:config@test", "notes.md"])
def test_an_unknown_dataset_is_refused_offline(source):
    with pytest.raises(ValueError, match=f"cannot load text '{source}': it is not 'wikipedia-sample'"):
        load_documents(source)


@given(
    st.lists(st.integers(1, 400), min_size=8, max_size=60),
    st.lists(st.sampled_from(ROLES), min_size=1, unique=True),
    st.booleans(),
    st.integers(0, 9),
)
def test_every_document_is_dealt_to_one_role(lengths, roles, independent, seed):
    texts = [f"{index}|".ljust(length, "x") for index, length in enumerate(lengths)]
    dealt = deal_documents(Documents("numbered", texts, independent), roles, seed=seed)
    together = [text for role in roles for text in dealt[role]]
    assert sorted(together) == sorted(texts)
    assert dealt == deal_documents(Documents("numbered", texts, independent), roles, seed=seed)
    if not independent:
        assert together == texts


def test_shares_are_in_proportion():
    texts = [f"{index:03}" * 10 for index in range(500)]
    dealt = deal_documents(Documents("numbered", texts), ROLES)
    assert {role: len(dealt[role]) / 500 for role in ROLES} == pytest.approx(
        {role: SHARES[role] for role in ROLES}, abs=0.005
    )


def test_one_long_document_is_cut_for_all_roles(tmp_path):
    text = write_prose(tmp_path / "prose.txt").read_text()
    dealt = deal_documents(Documents("one", [text], independent=False), ROLES)
    assert "".join("".join(dealt[role]) for role in ROLES) == text
    for role in ROLES:
        assert len("".join(dealt[role])) / len(text) == pytest.approx(SHARES[role], abs=0.05)


def test_windows_are_the_text_cut_up(tokenizer):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    windows = make_windows([text[:300], text[300:]], tokenizer, name="abc", window=64)
    assert windows.ids.shape == (15, 64)
    assert tokenizer.decode(windows.ids.flatten()) == text[: 15 * 64]


def test_every_window_begins_as_the_tokenizer_begins_a_text(bos_tokenizer):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    windows = make_windows([text], bos_tokenizer, name="abc", window=64)
    assert windows.ids.shape == (1000 // 63, 64)
    assert windows.ids[:, 0].tolist() == [0] * len(windows)
    assert bos_tokenizer.decode(windows.ids[:, 1:].flatten()) == text[: len(windows) * 63]


@pytest.mark.parametrize(("num_tokens", "num_windows"), [(256, 4), (300, 4), (10, 1), (None, 15), (10**9, 15)])
def test_no_more_tokens_than_asked_for(tokenizer, num_tokens, num_windows):
    assert len(make_windows(["a" * 1000], tokenizer, name="a", window=64, num_tokens=num_tokens)) == num_windows


@pytest.mark.parametrize("texts", [[], ["short"], [""]])
def test_text_shorter_than_a_window_is_refused(tokenizer, texts):
    with pytest.raises(ValueError, match=r"text 'notes' has \d tokens, fewer than one window of 64"):
        make_windows(texts, tokenizer, name="notes", window=64)


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
