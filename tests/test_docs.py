"""What the READMEs say exists: commands, options, files, modules, keys; and their Python runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import config_reference
import pytest
import typer
from conftest import write_prose
from shoal_services.cli import app
from shoal_services.pretraining.config import load_pretrain_config
from shoal_services.search.config import load_config
from shoal_services.serving.sources import read_sources

ROOT = Path(__file__).parents[1]
FOLDERS = ("compression", "services", "tests", "tune_configs", "k8s")
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "compression" / "FINDINGS.md"]
DOCUMENTS += [ROOT / folder / "README.md" for folder in FOLDERS]
MAX_LINES = 150  # of the main README
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


def name_document(path: Path) -> str:
    return str(path.relative_to(ROOT))


COMMANDS = [(name_document(path), command) for path in DOCUMENTS for command in read_commands(path)]
EXAMPLES = [
    (name, line.strip())
    for name, command in list_commands()
    for line in (command.callback.__doc__ or "").splitlines()
    if line.strip().startswith("shoal ")
]


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[": ".join(pair) for pair in COMMANDS])
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


def read_files(key: str) -> list[str]:
    """The YAML blocks of all documents that are files with this key."""
    return [block for path in DOCUMENTS for block in read_blocks(path, ("yaml",)) if re.search(f"^{key}:", block, re.M)]


@pytest.mark.parametrize("block", read_files("variants"))
def test_what_the_readmes_say_of_serving_is_served(block, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(block)
    assert read_sources([str(file)]).variants


@pytest.mark.parametrize("block", read_files("model"))
def test_the_searches_in_the_readmes_load(block, tmp_path):
    file = tmp_path / "search.yaml"
    file.write_text(block)
    assert load_config(file).num_trials


def test_the_readmes_name_every_command():
    assert set(COMMAND.commands) <= {command.split()[1] for _, command in COMMANDS if len(command.split()) > 1}


def test_the_main_readme_is_short_and_leads_to_every_folder():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert not [folder for folder in FOLDERS if f"({folder}/README.md)" not in text]


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


TREES = [block for path in DOCUMENTS for block in read_blocks(path, ("",)) if block.split()[0].endswith("/")]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.split()[0])
def test_a_layout_is_on_disk(tree):
    named = [path for path in read_tree(tree) if not PLACEHOLDER.search(path)]
    assert not [path for path in named if not list(ROOT.glob(path.strip("/")))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_document)
def test_named_files_exist(document):
    """Every YAML and Python file, and every relative link, of a document; links lead to headings that are there."""
    text = document.read_text(encoding="utf-8")
    assert not [path for path in re.findall(r"\b((?:tune_configs|k8s)/[\w.-]+\.yaml)", text) if not (ROOT / path).is_file()]
    assert not [path for path in re.findall(r"[\w/.-]*\w\.py\b", text) if not list(ROOT.glob(f"**/{path}"))]
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, heading = link.partition("#")
        if not re.match(r"[a-z]+:", link):
            target = document.parent / place if place else document
            assert target.exists(), link
            assert not heading or heading in list_anchors(target), link


def list_anchors(path: Path) -> list[str]:
    """The headings of a document as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_document)
def test_named_modules_exist(document):
    """`shoal.replace.choose` is a module, `shoal.recipe.Recipe` a name in one."""
    for name in set(re.findall(r"`(shoal(?:_services)?(?:\.\w+)+)", document.read_text(encoding="utf-8"))):
        module, _, last = name.rpartition(".")
        assert read_module(name) or re.search(rf"\b{last}\b", read_module(module)), name


def read_module(name: str) -> str:
    """A module's text, empty where there is no such module."""
    places = [ROOT / root / name.replace(".", "/") for root in ("compression", "services")]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
    return files[0].read_text(encoding="utf-8") if files else ""


def test_named_searches_load():
    for document in DOCUMENTS:
        for path in re.findall(r"\btune_configs/[\w.-]+\.yaml", document.read_text(encoding="utf-8")):
            load = load_pretrain_config if "/pretrain-" in path else load_config
            load(ROOT / path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_document)
def test_named_make_targets_exist(document):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = re.findall(r"^\$?\s*make ([\w-]+)", "\n".join(read_blocks(document, SHELLS)), flags=re.M)
    assert set(named) <= targets


def test_the_reference_of_keys_is_that_of_the_schema():
    text = config_reference.README.read_text(encoding="utf-8")
    assert text == config_reference.renew(text), "stale: renew it with `python tests/config_reference.py`"


def test_every_search_file_has_a_line():
    text = config_reference.README.read_text(encoding="utf-8")
    assert not [path.name for path in (ROOT / "tune_configs").glob("*.yaml") if f"| `{path.name}` |" not in text]


def test_the_python_of_the_library_runs(tiny_random, tmp_path, monkeypatch):
    """All blocks of its README, one after the other, with a tiny model and generated pages in place of the real ones."""
    pages = [write_prose(tmp_path / f"{seed}.txt", num_sentences=50, seed=seed).read_text() for seed in range(40)]
    monkeypatch.setattr("shoal.text.sources._read_wikipedia_sample", lambda: pages)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in read_blocks(ROOT / "compression" / "README.md", ("python",)):
        exec(block.replace("smollm2-135m", tiny_random), names)
