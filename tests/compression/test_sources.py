"""Sources give what they hold, as it was meant; what cannot be read so is refused by name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pytest
from conftest import write_prose
from datasets import ClassLabel, Dataset, Features, Value
from shoal.text.rows import read_rows
from shoal.text.sources import load_documents
from shoal.text.windows import make_windows
from shoal.texts import PACKAGED_TEXT, text_format

PAGES = ["One page.", "Another page,\n\nin ünïcode.", "  \n ", "The last."]
# As `Salesforce/wikitext` has it: a row a line, each with its line break.
WIKITEXT = [
    "", " = Robert Boulter = \n", "", " Robert Boulter is an English film actor . \n", " He had a guest role . \n", "",
    " = = Career = = \n", "", "", " = = = 2000 – 2005 = = = \n", "", " In 2000 Boulter had a role . \n",
]  # fmt: skip
TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def write_jsonl(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def write_column(path: Path, column: str, values: list) -> str:
    return write_jsonl(path, *({"page": page, column: value} for page, value in enumerate(values)))


def pack_zst(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


def test_a_text_file_is_one_running_text(tmp_path):
    file = write_prose(tmp_path / "prose.txt")
    documents = load_documents(str(file))
    assert documents.texts == [file.read_text()]
    assert (documents.name, documents.independent) == ("prose.txt", False)


@pytest.mark.parametrize("column", ["text", "content", "whatever"])
def test_rows_are_documents(tmp_path, column):
    documents = load_documents(write_column(tmp_path / "pages.jsonl", column, [*PAGES, None]))
    assert documents.texts == [PAGES[0], PAGES[1], PAGES[3]]
    assert documents.independent


def test_parquet_and_a_list_of_objects_hold_rows_too(tmp_path):
    Dataset.from_dict({"title": ["a", "b", "c"], "text": [PAGES[0], None, PAGES[1]]}).to_parquet(tmp_path / "pages.parquet")
    assert load_documents(str(tmp_path / "pages.parquet")).texts == PAGES[:2]
    (tmp_path / "pages.json").write_text(json.dumps([{"text": page} for page in PAGES], indent=1))
    assert load_documents(str(tmp_path / "pages.json")).texts == [PAGES[0], PAGES[1], PAGES[3]]


def test_lines_of_wikitext_give_the_tokens_that_the_field_reads(tmp_path, tokenizer):
    documents = load_documents(write_column(tmp_path / "test.jsonl", "text", WIKITEXT * 5))
    recipe = tokenizer("\n\n".join(WIKITEXT * 5))["input_ids"]  # GPTQ, SparseGPT, Wanda, the guide of transformers
    windows = make_windows(documents, tokenizer, window=16)
    assert windows.ids.flatten().tolist() == recipe[: windows.num_tokens] and len(recipe) - windows.num_tokens < 16


def test_lines_without_their_breaks_are_one_text_where_many_are_blank(tmp_path):
    lines = ["A line.", "", "Another.", "", "The last."]
    documents = load_documents(write_column(tmp_path / "lines.jsonl", "text", lines))
    assert (documents.texts, documents.independent) == (["\n".join(lines)], False)
    assert load_documents(write_column(tmp_path / "few.jsonl", "text", [*lines[::2] * 3, ""])).independent


def test_the_packaged_sample_is_prose():
    documents = load_documents(PACKAGED_TEXT)
    assert len(documents.texts) > 50 and documents.independent
    assert all("{{" not in text and "[[" not in text for text in documents.texts)
    assert sum(map(len, documents.texts)) > 500_000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, pack_zst])
def test_marked_encodings_and_packed_files_are_read_rightly(tmp_path, encoding, pack):
    """Whatever the name says of how it is packed."""
    text, rows = "Naïve 文字.\n" * 2000, [{"text": page} for page in PAGES]
    (tmp_path / "notes.txt").write_bytes(pack(text.encode(encoding)))
    (tmp_path / "rows.jsonl.gz").write_bytes(pack("\r\n".join(map(json.dumps, rows)).encode(encoding)))
    assert load_documents(str(tmp_path / "notes.txt")).texts == [text]
    assert list(read_rows(str(tmp_path / "rows.jsonl.gz"))) == rows


def test_a_path_is_no_pattern(tmp_path):
    """A pattern would read the second file."""
    for name in ("a[1]*.jsonl", "a1b.jsonl"):
        write_column(tmp_path / name, "text", [f"In {name}."])
    assert load_documents(str(tmp_path / "a[1]*.jsonl")).texts == ["In a[1]*.jsonl."]
    Dataset.from_dict({"text": ["odd"]}).to_parquet(tmp_path / "x=[1]?.parquet")
    assert load_documents(str(tmp_path / "x=[1]?.parquet")).texts == ["odd"]


def test_formats_are_told_by_name():
    names = ("a.txt", "A.TXT.gz", "b.jsonl.zst", "c.parquet", "c.parquet.gz", "org/name", "notes.md", ".txt.d/x")
    assert [text_format(name) for name in names] == [".txt", ".txt", ".jsonl", ".parquet", None, None, None, None]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"messages": [{**turn, "tool_calls": None} for turn in TURNS], "prompt": "2+2?", "source": "x"},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, TURNS[1]]},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
    ],
)
def test_conversations_are_written_as_the_model_reads_them(tmp_path, tokenizer, row):
    tokenizer.chat_template = TEMPLATE + "{{ '\\n' }}"
    documents = load_documents(write_jsonl(tmp_path / "chat.jsonl", row, row), tokenizer)
    assert documents.texts == ["<user>2+2?<assistant>4\n"] * 2 and documents.independent, "though they look like lines"


def test_an_answer_follows_its_prompt(tmp_path):
    file = write_jsonl(tmp_path / "sft.jsonl", {"id": "x", "prompt": "2+2=", "completion": "4"})
    assert load_documents(file).texts == ["2+2=4"]


def test_conversations_that_cannot_be_written_are_refused(tmp_path, tokenizer):
    chat = write_jsonl(tmp_path / "chat.jsonl", {"messages": TURNS}, {"messages": [{"speaker": "x"}]})
    for no_template in (None, tokenizer):
        with pytest.raises(ValueError, match=r"'chat.jsonl', row 1: .* no chat template .* column 'text'"):
            load_documents(chat, no_template)
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match=r"'chat.jsonl', row 2: the message .*speaker.* has no role and content"):
        load_documents(chat, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        ValueError, match=r"row 1: the tokenizer's chat template refuses this conversation: roles must alternate"
    ):
        load_documents(chat, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist; check the path"),
        ("missing.jsonl.zst", None, "does not exist; check the path"),
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n ", "holds no text"),
        ("empty.jsonl", b"", "holds no text"),
        ("blank.jsonl", b'{"text": ""}\n{"text": null}\n', "holds no text"),
        ("null.jsonl", b'{"text": null}\n', "holds no text"),
        ("broken.jsonl", b'{"text": "a"}\n{not json', "line 2, is no JSON: .*one object a line"),
        ("list.jsonl", b'["a", "b"]\n', "row 1, is 'a', and no object with named fields"),
        ("broken.parquet", b"garbage", "damaged or no .parquet: .*smaller than the minimum"),
        ("numbers.jsonl", b'{"n": 3}\n', r"no column that is clearly the text; it has n \(int\). Rename .* to 'text'"),
        ("unclear.jsonl", b'{"a": "x", "b": "y"}\n', r"it has a \(str\), b \(str\)"),
        ("mixed.jsonl", b'{"text": "x"}\n' * 100 + b'{"text": 5}', "row 101: 'text' is '5', and no text"),
        ("latin.txt", "naïve".encode("latin-1"), r"is not UTF-8 .*0xef\); save it as UTF-8: iconv"),
        ("latin.jsonl", '{"text": "naïve"}'.encode("latin-1"), "is not UTF-8"),
        ("utf16.txt", "abc".encode("utf-16-le"), "holds zero bytes; if it is UTF-16"),
        ("torn.txt.gz", gzip.compress(b"text " * 1000)[:-20], "is damaged"),
        ("torn.jsonl.zst", pack_zst(b'{"text": "a"}\n' * 1000)[:-9], "is damaged"),
        ("notes.md", b"# Text", "of no kind that can be read: those are .txt, .jsonl"),
    ],
)  # fmt: skip
def test_files_without_text_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        load_documents(str(tmp_path / name))
    assert name in str(refused.value)


def test_folders_and_addresses_are_refused(tmp_path):
    (tmp_path / "notes.txt").mkdir()
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        load_documents(str(tmp_path / "notes.txt"))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "poem.txt").write_text("A line.\nAnother.\n")
    with pytest.raises(ValueError, match=r"plain' holds plain text files, .* give the .txt file itself"):
        load_documents(str(tmp_path / "plain"))
    (tmp_path / "odd[1]").mkdir()
    with pytest.raises(ValueError, match=r"odd\[1\]' would be taken for a pattern; rename it"):
        load_documents(str(tmp_path / "odd[1]"))
    with pytest.raises(ValueError, match=r"text 'https://host/notes.txt' is a URI, .* mount it .* or copy it"):
        load_documents("https://host/notes.txt")


@pytest.mark.parametrize("source", ["no-such/dataset", "no-such/dataset:config@test", "no-such"])
def test_an_unknown_dataset_is_refused_offline_with_the_cause(source):
    with pytest.raises(
        ValueError, match=f"cannot load text '{source}': it is not 'wikipedia-sample'.*'no-such.* on the Hub"
    ):
        load_documents(source)


def test_a_dataset_folder_is_read_by_split_and_a_wrong_one_is_named(tmp_path):
    for split in ("train", "test"):
        write_column(tmp_path / f"{split}.jsonl", "text", [f"Of {split}."])
    assert load_documents(f"{tmp_path}@test").texts == ["Of test."]
    with pytest.raises(ValueError, match=r"Unknown split .*valid.*test"):
        load_documents(f"{tmp_path}@valid")


def test_labels_are_given_by_name(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    Dataset.from_dict({"text": list("abc"), "label": [1, 0, -1]}, features).to_parquet(tmp_path / "d.parquet")
    assert [row["label"] for row in read_rows(str(tmp_path / "d.parquet"))] == ["good", "bad", None]
