"""What the README says exists: its commands, options, files and folders."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from shoal_services.cli import app
from shoal_services.pretraining.config import load_pretrain_config
from shoal_services.search.config import load_config
from shoal_services.serving.sources import read_sources

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for path in (ROOT / "README.md", *(ROOT / "k8s").glob("*.md")) if path.is_file())
SHELLS = ("bash", "sh", "shell", "console")
PLACEHOLDER = re.compile(r"[A-Z_]+$|\.\.\.|…")
COMMAND = typer.main.get_command(app)


def read_blocks(path: Path, languages: tuple[str, ...]) -> list[str]:
    """The document's code blocks in these languages."""
    found = re.findall(r"^```(\S*)[^\n]*\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [body for language, body in found if language in languages]


def read_commands(path: Path) -> list[str]:
    """The `shoal …` lines of a document's shell blocks, continued lines joined, comments and pipes taken off."""
    lines = []
    for block in read_blocks(path, SHELLS):
        for line in block.replace("\\\n", " ").splitlines():
            plain = line.strip().removeprefix("$ ").strip()
            plain = plain.removeprefix(".venv/bin/")
            if plain.startswith("shoal "):
                lines.append(" ".join(plain.split()))
    return lines


def parse(command: str) -> None:
    """Raises click's UsageError for a command, option or value type that does not exist."""
    words = shlex.split(command, comments=True)[1:]
    for end in ("|", ">", "2>", "&&", ";", "&"):
        words = words[: words.index(end)] if end in words else words
    if "--help" in words:
        assert words == ["--help"] or (words[0] in COMMAND.commands and words[1:] == ["--help"]), command
        return
    parse_words(COMMAND, "shoal", words)


def parse_words(command, name: str, words: list[str], parent=None) -> None:
    """A command's words, and where it is a group, those of the command in it."""
    with command.make_context(name, words, parent=parent) as context:
        rest = [*context._protected_args, *context.args]
        if hasattr(command, "commands") and rest:
            name, subcommand, rest = command.resolve_command(context, rest)
            parse_words(subcommand, name, rest, context)


def list_commands(group=COMMAND) -> Iterator[tuple[str, object]]:
    """Every command with its words after `shoal`, those of groups included."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", found) for inner, found in list_commands(command))
        else:
            yield name, command


COMMANDS = [(path.name, command) for path in DOCUMENTS for command in read_commands(path)]
EXAMPLES = [
    (name, line.strip())
    for name, command in list_commands()
    for line in (command.callback.__doc__ or "").splitlines()
    if line.strip().startswith("shoal ")
]


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[command for _, command in COMMANDS])
def test_every_command_in_the_documents_parses(document, command):
    parse(command)


@pytest.mark.parametrize(("command", "example"), EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_every_example_of_the_help_parses(command, example):
    assert example.split()[1 : 1 + len(command.split())] == command.split()
    parse(example)


@pytest.mark.parametrize(
    "command", ["shoal compres x", "shoal compress x --blocs 3", "shoal search", "shoal compress x -n three"]
)
def test_a_wrong_command_does_not_parse(command):
    """The check itself can fail."""
    with pytest.raises(Exception, match=r"No such command|No such option|Missing parameter|a valid integer"):
        parse(command)


@pytest.mark.parametrize("name", [name for name, _ in list_commands()])
def test_every_command_has_examples(name):
    assert any(command == name for command, _ in EXAMPLES)


@pytest.mark.parametrize("block", [b for b in read_blocks(ROOT / "README.md", ("yaml",)) if "variants:" in b])
def test_what_the_readme_says_of_serving_is_served(block, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(block)
    assert read_sources([str(file)]).variants


def test_the_readme_names_every_command():
    if not COMMANDS:
        pytest.skip("the README holds no commands yet")
    told = {command.split()[1] for _, command in COMMANDS if len(command.split()) > 1}
    assert set(COMMAND.commands) <= told


def read_tree(text: str) -> list[str]:
    """The paths of a layout tree: by indentation (or box-drawing lines), each line's first word."""
    paths: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in text.splitlines():
        plain = re.sub(r"[│├└─]", " ", line)
        if not plain.strip():
            continue
        indent = len(plain) - len(plain.lstrip())
        # Several names on one line stand two or more spaces before the explanation.
        names = re.split(r"\s{2,}|\s+[#—–-]", plain.strip())[0].split()
        parents = [(depth, folder) for depth, folder in parents if depth < indent]
        above = "".join(folder for _, folder in parents)
        paths += [above + name for name in names]
        if names[0].endswith("/"):
            parents.append((indent, names[0]))
    return paths


TREES = [
    block
    for block in read_blocks(ROOT / "README.md", ("", "text"))
    if "compression/" in block and "services/" in block and "tests/" in block
]


def test_the_layout_in_the_readme_is_on_disk():
    if not TREES:
        pytest.skip("the README holds no layout tree yet")
    for tree in TREES:
        named = [path for path in read_tree(tree) if not PLACEHOLDER.search(path)]
        root = named[0] if named[0].strip("/") in ("shoal", ".") else ""
        missing = [path for path in named if not list(ROOT.glob(path.removeprefix(root).strip("/") or "*"))]
        assert not missing


def test_the_layout_names_every_folder():
    if not TREES:
        pytest.skip("the README holds no layout tree yet")
    told = {path.strip("/").split("/")[0] for path in read_tree(TREES[0])}
    assert {"compression", "services", "tune_configs", "tests"} <= told


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document):
    """Every tune_configs/….yaml, k8s/….yaml and relative link of a document."""
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"\b((?:tune_configs|k8s)/[\w.-]+\.yaml)", text)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]
    assert not [path for path in named if not (ROOT / path).is_file()]
    assert not [link for link in links if not (document.parent / link).exists()]


def test_named_searches_load():
    for document in DOCUMENTS:
        for path in re.findall(r"\btune_configs/[\w.-]+\.yaml", document.read_text(encoding="utf-8")):
            load = load_pretrain_config if "/pretrain-" in path else load_config
            load(ROOT / path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_make_targets_exist(document):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = re.findall(r"^\$?\s*make ([\w-]+)", "\n".join(read_blocks(document, SHELLS)), flags=re.M)
    assert set(named) <= targets
