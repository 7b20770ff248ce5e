"""Where texts come from. A source is one of

    wikipedia-sample                       100 English Wikipedia pages, packaged (gensim's test data)
    notes.txt  corpus.jsonl  data.parquet  a local file; .txt, .jsonl and .json also packed (.gz, .zst, .bz2, .xz)
    org/name  org/name:config  org/name:config@split   a Hub dataset

and gives whole documents, or one running text. A .txt file is one text. Rows are documents, unless they are the lines of
one text: no row has a line break but at its end, and most end in one (WikiText) or more than a quarter are blank.
Lines are joined as they were, those of WikiText as everybody joins them: "\\n\\n".join(rows), headings and blank rows among
them, so that perplexities compare (GPTQ, arXiv 2210.17323, and the perplexity guide of transformers).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from shoal.files import require_path
from shoal.text.rows import Row, read_rows, read_text
from shoal.texts import PACKAGED_TEXT, text_format

TEXT_COLUMNS = ("text", "content", "document", "story", "article")
CHAT_COLUMNS = ("messages", "conversations", "conversation")
ANSWER_COLUMNS = ("completion", "response")
# As ShareGPT's files name those who speak.
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
# Rows that are looked at to find the column; of a larger data set the first rows are used: some hundred million tokens.
ROWS_TO_LOOK_AT, MAX_CHARACTERS = 100, 500_000_000
BLANK_SHARE = 0.25


@dataclass(frozen=True)
class Documents:
    """Texts of one source: documents, each of which ends; or, not `independent`, stretches of one text, in order."""

    name: str
    texts: list[str]
    independent: bool = True


def load_documents(source: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Documents:
    """The documents of a source (see the module's text). Conversations are written by the tokenizer's chat template.

    Raises ValueError if it is not there, holds no text, or has no column that is clearly the text.
    """
    require_path(source, "text")
    if source == PACKAGED_TEXT:
        documents = Documents(source, _read_wikipedia_sample())
    elif text_format(source) == ".txt":
        documents = Documents(Path(source).name, [read_text(Path(source))], independent=False)
    else:
        name = Path(source).name if text_format(source) else source
        documents = _read_documents(name, read_rows(source), tokenizer)
    texts = [text for text in documents.texts if text.strip()]
    if not texts:
        raise ValueError(f"{source!r} holds no text: every document is empty")
    return Documents(documents.name, texts, documents.independent)


def _read_wikipedia_sample() -> list[str]:
    """The pages of gensim's test dump that are articles, with the wiki markup taken out."""
    import bz2

    from gensim.corpora.wikicorpus import extract_pages, filter_wiki
    from gensim.test.utils import datapath

    dump = datapath("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")
    with bz2.open(dump) as file:
        pages = [filter_wiki(text) for _, text, _ in extract_pages(file, filter_namespaces=("0",))]
    # Redirects are shorter than 1,000 characters. Lines without a full stop are the remains of tables and lists.
    return [_keep_sentences(page) for page in pages if len(page) > 1000]


def _keep_sentences(page: str) -> str:
    lines = (line.strip().replace("'''", "").replace("''", '"') for line in page.splitlines())
    return "\n\n".join(line for line in lines if line.startswith("==") or ". " in line or line.endswith("."))


def _read_documents(name: str, rows: Iterator[Row], tokenizer: PreTrainedTokenizerBase | None) -> Documents:
    """The texts of the rows that have one, up to `MAX_CHARACTERS` altogether."""
    first = list(itertools.islice(rows, ROWS_TO_LOOK_AT))
    read, is_plain = _choose_reader(name, first, tokenizer)
    texts: list[str] = []
    size = 0
    for number, row in enumerate(itertools.chain(first, rows), 1):
        try:
            text = read(row)
        except ValueError as error:
            raise ValueError(f"{name!r}, row {number}: {error}") from error
        if text is not None:
            texts.append(text)
            size += len(text)
        if size >= MAX_CHARACTERS:
            break
    return _as_documents(name, texts) if is_plain else Documents(name, texts)


def _as_documents(name: str, rows: list[str]) -> Documents:
    """Rows as documents, or as the running text whose lines they are."""
    written = [row for row in rows if row.strip()]
    if not written or any("\n" in row.rstrip("\n") for row in written):
        return Documents(name, rows)
    if 2 * sum(row.endswith("\n") for row in written) > len(written):
        return Documents(name, ["\n\n".join(rows)], independent=False)
    if len(rows) - len(written) > BLANK_SHARE * len(rows):
        return Documents(name, ["\n".join(rows)], independent=False)
    return Documents(name, rows)


def _choose_reader(
    name: str, rows: list[Row], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Callable[[Row], str | None], bool]:
    """How a row becomes text, judged by the first rows, and whether that is a column of plain text.

    Raises ValueError if nothing in them is clearly the text.
    """
    kinds: dict[str, set[type]] = {}
    for column, value in (cell for row in rows for cell in row.items()):
        kinds.setdefault(column, set()).update(() if value is None else (type(value),))
    written = [column for column in kinds if kinds[column] == {str}]
    text = next((column for column in TEXT_COLUMNS if column in written), None)
    chat = next((column for column in CHAT_COLUMNS if kinds.get(column) == {list}), None)
    answer = next((column for column in ANSWER_COLUMNS if column in kinds and kinds[column] == kinds.get("prompt")), "")
    if text is None and chat is None and not answer and len(written) == 1:
        text = written[0]
    if text is not None:
        return (lambda row: _require_text(text, row.get(text))), True
    if chat is not None:
        return (lambda row: write_chat(row.get(chat), tokenizer)), False
    if kinds.get(answer) == {str}:
        return (lambda row: f"{row.get('prompt') or ''}{row.get(answer) or ''}"), False
    if kinds.get(answer) == {list}:
        return (lambda row: write_chat([*(row.get("prompt") or ()), *(row.get(answer) or ())], tokenizer)), False
    if not any(kinds.values()):  # rows without any value are rows without text
        return (lambda row: None), True
    names = [f"{column} ({'/'.join(sorted(kind.__name__ for kind in kinds[column])) or 'empty'})" for column in kinds]
    raise ValueError(
        f"{name!r} has no column that is clearly the text; it has {', '.join(names)}. Rename the one to use to 'text' (a "
        "string), or to 'messages' (a list of {role, content})"
    )


def _require_text(column: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{column!r} is {str(value)[:60]!r}, and no text")
    return value


def write_chat(messages: list[dict[str, Any]] | None, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """A conversation as the model reads it. Raises ValueError if it is none, or the tokenizer has no chat template."""
    if not messages:
        return None
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(
            "it is a conversation, and the model's tokenizer has no chat template to write it with; give text in a column "
            "'text'"
        )
    from jinja2 import TemplateError

    turns = [_read_turn(message) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the tokenizer's chat template refuses this conversation: {error}") from error


def _read_turn(message: Any) -> dict[str, Any]:
    """A message with `role` and `content`; ShareGPT calls them `from` and `value`."""
    if not isinstance(message, dict):
        raise ValueError(f"the message {str(message)[:60]!r} is no object with role and content")
    turn = {key: value for key, value in message.items() if value is not None}
    role, content = turn.pop("role", turn.pop("from", None)), turn.pop("content", turn.pop("value", None))
    if not isinstance(role, str) or (content is None and not turn):
        raise ValueError(f"the message {str(message)[:60]!r} has no role and content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part.get("text") or "" for part in content)
    return {"role": SPEAKERS.get(role, role), "content": content, **turn}
