"""Imports go one way: what a room imports is what the table of its package's README says, and nothing goes in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"shoal": ROOT / "compression" / "shoal", "shoal_services": ROOT / "services" / "shoal_services"}
HEADER = ["room", "for", "may import"]
# What the library runs without.
OF_SERVICES = {"shoal_services", "ray", "mlflow", "fastapi"}

Arrows = dict[str, set[str]]


@dataclass(frozen=True)
class Package:
    """A package's files by module, and the lines of its table: rooms, and what they may import; the ground comes first."""

    name: str
    files: Mapping[str, Path]
    lines: list[tuple[list[str], list[str]]]

    @property
    def rooms(self) -> list[str]:
        return [name for names, _ in self.lines for name in names]

    def room_of(self, module: str) -> str:
        """The room with the longest name that the module is in; the package's own file is the door."""
        parts = module.split(".")[1:]
        if not parts:
            return self.name
        known, inside = set(self.rooms), [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        return next((name for name in inside if name in known), parts[0])

    def find_arrows(self) -> Arrows:
        """What each room imports, of the rooms of its own package."""
        arrows: Arrows = {self.room_of(module): set() for module in self.files}
        for module, imported in self.read_imports():
            if imported.split(".")[0] == self.name and self.room_of(imported) != self.room_of(module):
                arrows[self.room_of(module)].add(self.room_of(imported))
        return arrows

    def read_imports(self) -> Iterator[tuple[str, str]]:
        """(module, what it imports) for every import of the package, wherever it stands."""
        for module, file in self.files.items():
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from ((module, alias.name) for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    assert node.module and not node.level, f"{module} imports by a relative name"
                    for alias in node.names:
                        full = f"{node.module}.{alias.name}"
                        yield module, full if full in self.files else node.module

    def find_allowed(self) -> Arrows:
        """What each room may import: the rooms that its line names, what those may, and the ground."""
        ground = self.lines[0][0]
        allowed = {name: {*given, *ground} - {name} for names, given in self.lines for name in names}
        while True:
            wider = {name: given.union(*(allowed[one] for one in given)) - {name} for name, given in allowed.items()}
            if wider == allowed:
                return allowed
            allowed = wider


def read_package(name: str) -> Package:
    """The package, and the table in the README beside it."""
    folder = PACKAGES[name]
    files = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    section = (folder.parent / "README.md").read_text(encoding="utf-8").split("\n## Rooms\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in section.splitlines() if "|" in line]
    rows = rows[rows.index(HEADER) + 2 :]
    return Package(name, files, [(re.findall(r"`([\w.]+)`", row[0]), re.findall(r"`([\w.]+)`", row[2])) for row in rows])


@pytest.fixture(scope="module", params=PACKAGES)
def package(request) -> Package:
    return read_package(request.param)


def require_one_way(arrows: Arrows) -> None:
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {' → '.join(reversed(error.args[1]))}")


def test_the_table_has_every_room_once_and_no_other(package):
    assert len(package.rooms) == len(set(package.rooms))
    assert set(package.rooms) == set(package.find_arrows())
    assert {name for _, given in package.lines for name in given} <= set(package.rooms)


def test_a_room_imports_what_its_line_allows(package):
    allowed = package.find_allowed()
    wrong = {room: found - allowed[room] for room, found in package.find_arrows().items() if found - allowed[room]}
    assert not wrong, f"imports that {package.name}'s table does not have: {wrong}"


def test_a_line_names_no_room_for_nothing(package):
    arrows = package.find_arrows()
    for names, given in package.lines:
        used = set().union(*(arrows[name] for name in names))
        assert set(given) <= used, f"{names} import nothing of {set(given) - used}"


def test_rooms_import_one_way(package):
    require_one_way(package.find_arrows())
    require_one_way({name: set(given) for names, given in package.lines for name in names})


def test_every_room_says_what_it_is_for(package):
    for file in package.files.values():
        if file.name == "__init__.py":
            assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), f"{file} has no docstring"


def test_the_library_knows_nothing_of_the_services():
    found = {(module, name) for module, name in read_package("shoal").read_imports() if name.split(".")[0] in OF_SERVICES}
    assert not found
