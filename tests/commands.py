"""The command `shoal`, run within a test as the installed one runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from shoal_services.cli import main

SCREEN_LINES = 25


@dataclass
class Said:
    """What a command printed, and its exit code."""

    code: int
    output: str
    errors: str


@pytest.fixture
def shoal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_random: str, tmp_path: Path
) -> Callable[..., Said]:
    """Runs `shoal` with these words in an empty folder, as the installed command does."""

    def run(*words: object) -> Said:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setenv("SHOAL_DEBUG", "")
        monkeypatch.setattr(sys, "argv", ["shoal", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Said(int(ended.value.code or 0), *capsys.readouterr())

    return run


def assert_refused(said: Said, *parts: str) -> None:
    """One screen without a traceback, exit code 1, and these words."""
    assert said.code == 1, said.errors
    assert said.output == ""
    assert "Traceback" not in said.errors
    assert len(said.errors.splitlines()) < SCREEN_LINES
    assert [line for line in said.errors.splitlines() if line.startswith("shoal: ")]
    told = " ".join(said.errors.split())
    for part in parts:
        assert part in told
