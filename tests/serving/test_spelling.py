"""Every token's bytes, in a row, are the text; what a prompt says before it decides how a text begins."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal_services.serving.engine.generation import Token
from shoal_services.serving.engine.spelling import Spelling
from shoal_services.serving.engine.text_stream import TextStream
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORDS = ["The", "sea", "is", "deep", "é", "中"]


@cache
def make_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """A tokenizer of a few words, put together like those of Llama 2, GPT-2, or BERT. Token 0 is special."""
    if kind == "sentencepiece":
        pieces = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *(f"▁{word}" for word in WORDS), *WORDS]
        made = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, [], byte_fallback=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    elif kind == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pieces = ["<s>", *alphabet, "Ġsea", "Ã©", "ä¸"]
        made = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, []))
        made.decoder = decoders.ByteLevel()
    else:
        pieces = ["<s>", "the", "sea", "##ing", "é", "中", "."]
        made = Tokenizer(models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="<s>"))
        made.decoder = decoders.WordPiece(cleanup=False)
    made.add_special_tokens([AddedToken("<s>", special=True)])
    made.add_tokens([AddedToken(" <think> ", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


KINDS = ("sentencepiece", "bytes", "wordpiece")


def find_ids(tokenizer: PreTrainedTokenizerBase, *names: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(name) for name in names]


def continue_text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], ids: list[int]) -> str:
    stream = TextStream(Spelling(tokenizer))
    stream.follow(tuple(prompt))
    return "".join(map(stream.push, ids)) + stream.flush()


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_the_bytes_of_tokens_make_up_the_text(kind: str, data: st.DataObject):
    """Whatever a model may say, also what no tokenizer would: no token is refused, and no text takes back another."""
    tokenizer = make_tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=12))
    spelling, stream = Spelling(tokenizer), TextStream(Spelling(tokenizer))
    spelled, text = b"", ""
    for id in ids:
        token = spelling.label(Token(id), stream.before)
        spelled += token.spelled or b""
        text += stream.push(id)
        assert spelled.decode("utf-8", "replace").startswith(text)
    text += stream.flush()
    assert text == spelled.decode("utf-8", "replace")
    whole = str(tokenizer.decode([id for id in ids if id < len(tokenizer)], skip_special_tokens=True))
    # A run of bytes with one that is wrong is "�" all over in a decoder that falls back to bytes; in ours the rest stands.
    assert text == whole or "�" in whole


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_continuation_is_the_rest_of_the_whole_text(kind: str, data: st.DataObject):
    tokenizer = make_tokenizer(kind)
    ordinary = [id for id in range(len(tokenizer)) if "�" not in tokenizer.decode([id])]
    prompt, ids = (data.draw(st.lists(st.sampled_from(ordinary), max_size=8)) for _ in range(2))
    whole, before = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (prompt + ids, prompt))
    assert before + continue_text(tokenizer, prompt, ids) == whole


def test_a_sentencepiece_text_keeps_the_space_before_its_first_word():
    tokenizer = make_tokenizer("sentencepiece")
    the, sea, start = find_ids(tokenizer, "▁The", "▁sea", "<s>")
    assert continue_text(tokenizer, [start, the], [sea]) == " sea"
    assert continue_text(tokenizer, [start, the, start], [sea]) == " sea"
    assert continue_text(tokenizer, [start], [sea]) == "sea"


def test_a_character_that_the_prompt_left_unfinished_is_finished():
    tokenizer = make_tokenizer("sentencepiece")
    assert continue_text(tokenizer, find_ids(tokenizer, "▁sea", "<0xE4>", "<0xB8>"), find_ids(tokenizer, "<0xAD>")) == "中"


def test_bytes_that_become_wrong_later_take_nothing_back():
    tokenizer = make_tokenizer("sentencepiece")
    ids = find_ids(tokenizer, "▁sea", "<0xE4>", "<0xB8>", "<0xAD>", "<0xFF>", "▁deep")
    assert continue_text(tokenizer, [], ids) == "sea中� deep"


def test_tokens_are_shown_as_openai_shows_them():
    tokenizer = make_tokenizer("sentencepiece")
    start, part, the = find_ids(tokenizer, "<s>", "<0xE4>", "▁The")
    spelling = Spelling(tokenizer)
    shown = [spelling.label(Token(id), the) for id in (start, part, the)]
    assert [(token.text, token.spelled) for token in shown] == [
        ("<s>", None), ("bytes:\\xe4", b"\xe4"), (" The", b" The"),
    ]  # fmt: skip
