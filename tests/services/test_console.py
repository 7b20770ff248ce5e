"""What is printed is whole at any width, as it is, and without passwords."""

from __future__ import annotations

import io
import re
import shlex

import pytest
from conftest import make_point
from pages import make_profile, make_scores
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from shoal.frontier import find_frontier
from shoal.point import TaskScore
from shoal_services.commands.jobs import _say_how_to_return
from shoal_services.commands.terminal import ProgressDisplay, tell_delivery, tell_runs
from shoal_services.console import mask_passwords, name_of, say, show
from shoal_services.pages import tables
from shoal_services.tracking.tracker import Delivery

NAME = "org/a-model-with-a-long-name[v2]:smile:"
POINTS = [
    make_point(101_000_000, 258.82, kind="folded", num_replaced=12, blocks=tuple(range(12))),
    make_point(111_000_000, 14.89),
    make_point(121_000_000, 12.34, kind="low_rank", rank=128, sparsity="2:4", weight_share=0.8),
]
SCORE = TaskScore(
    task="super-glue-lm-eval-v1", metric="acc_norm", num_examples=12345, score=0.512, standard_error=0.013, dense_score=0.6,
    dense_standard_error=0.014, difference_standard_error=0.01,
)  # fmt: skip
TABLES = {
    "frontier": lambda: tables.frontier_table(NAME, find_frontier(POINTS)),
    "linearity": lambda: tables.linearity_table(NAME, make_scores(4, sink_block=2)),
    "comparison": lambda: tables.comparison_table([make_profile(NAME, 3), make_profile("b", 5)]),
    "point": lambda: tables.point_table(POINTS[0]),
    "evaluation": lambda: tables.evaluation_table(NAME, POINTS[0].evaluations),
    "tasks": lambda: tables.task_table(NAME, [SCORE]),
}


def printed(table: Table, width: int) -> str:
    file = io.StringIO()
    show(table, to=Console(file=file, width=width, highlight=False, markup=False, emoji=False))
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("name", TABLES)
def test_no_number_is_cut_at_any_width(name, width):
    numbers = [
        str(cell) for column in TABLES[name]().columns if column.justify == "right" for cell in column.cells if str(cell)
    ]
    text = printed(TABLES[name](), width)
    assert numbers and all(number in text for number in numbers)
    assert "…" not in text and max(map(cell_len, text.splitlines())) <= width


def test_the_frontier_is_a_table_at_80_columns_and_rows_of_lines_at_60():
    wide, narrow = (printed(TABLES["frontier"](), width) for width in (80, 60))
    assert re.search(r"smallest +12 folded +101.0M +404 +258.82 ± 4.04 ", wide)
    assert re.search(r"^perplexity +258.82 ± 4.04$", narrow, re.MULTILINE)


def test_names_are_no_markup():
    assert NAME in printed(TABLES["linearity"](), 200) and NAME in printed(TABLES["comparison"](), 200)


def test_lines_to_copy_are_never_broken(capsys):
    path = "/mnt/a folder[v2]/" + "deep/" * 60
    say(f"page: {path} :smile: [bold]x[/bold]")
    assert capsys.readouterr().err == f"page: {path} :smile: [bold]x[/bold]\n"


@pytest.mark.parametrize(
    ("uri", "masked"),
    [
        ("postgresql://me:s3cret@db:5432/x", "postgresql://me:***@db:5432/x"),
        ("http://me:s3/cret@host", "http://me:***@host"),
        ("http://:s3cret@[::1]:80/", "http://:***@[::1]:80/"),
        ("mysql+pymysql://me:p@s3cret@db/x", "mysql+pymysql://me:***@db/x"),
        ("no answer from 'http://me:s3cret@host': gone", "no answer from 'http://me:***@host': gone"),
        ("https://host/x?user=me&token=s3cret&a=b", "https://host/x?user=me&token=***&a=b"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("sqlite:////a/b.db and me@example.org", "sqlite:////a/b.db and me@example.org"),
    ],
)
def test_passwords_are_never_printed(capsys, uri, masked):
    assert mask_passwords(uri) == masked
    say(uri)
    tell_runs(uri)
    tell_delivery(Delivery(3, f"no answer from {uri}"))
    ProgressDisplay().remark(uri)
    assert "s3cret" not in capsys.readouterr().err
    assert "s3cret" not in _say_how_to_return("job-1", uri)


def test_closing_commands_can_be_pasted(capsys):
    tell_runs("sqlite:////mnt/my runs[v2]/" + "x" * 200 + "/mlflow.db")
    line = capsys.readouterr().err.removeprefix("runs:").rstrip("\n")
    assert shlex.split(line)[:3] == ["mlflow", "ui", "--backend-store-uri"] and len(shlex.split(line)) == 4
    tell_runs("http://mlflow:5000")
    assert capsys.readouterr().err.split() == ["runs:", "http://mlflow:5000"]


def test_a_model_has_a_name_wherever_it_lies(tmp_path, monkeypatch):
    folder = tmp_path / "my-llama" / "sub"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert [name_of(place) for place in (".", "./", "..", "../sub/", str(folder))] == [
        "sub",
        "sub",
        "my-llama",
        "sub",
        "sub",
    ]
    assert [name_of(name) for name in ("org/name", "smollm2-135m", "/")] == ["name", "smollm2-135m", "model"]
