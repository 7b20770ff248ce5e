"""Curves hold every point of a grid once, in the family that its recipe belongs to, beside the dense model."""

from __future__ import annotations

import pytest
from conftest import make_point
from pages import Page, drawn
from shoal.point import TaskScore
from shoal_services.pages.curves_page import group_curves, perplexity_figure, write_curves_page

DISTILLED = {"num_tokens": 4096, "learning_rate": 1e-4, "trained": "maps"}


def curve_point(num_replaced: int, perplexity: float, **recipe):
    values = {"kind": "linear", "selection": "linearity", **recipe}
    return make_point(100_000_000, perplexity, num_replaced=num_replaced, blocks=range(1, num_replaced + 1), **values)


POINTS = [
    curve_point(4, 40.0, kind="dropped"),
    curve_point(2, 20.0, kind="dropped"),
    curve_point(2, 15.0),
    curve_point(4, 25.0, distillation=DISTILLED),
    curve_point(2, 14.0, distillation=DISTILLED),
    curve_point(2, 16.0, kind="dropped", distillation={**DISTILLED, "trained": "all"}),
]
REPLACEMENT = "linear replacement"
FAMILIES = {
    "removal": [(2, 20.0), (4, 40.0)],
    "removal + distillation of all parameters": [(2, 16.0)],
    "linear replacement": [(2, 15.0)],
    "linear replacement + distillation of the maps": [(2, 14.0), (4, 25.0)],
}


def read_curves(points) -> dict[str, list[tuple[int, float]]]:
    return {c.label: [(p.recipe.num_replaced, p.perplexity) for p in c.points] for c in group_curves(points)}


def test_points_are_grouped_by_how_they_were_made():
    assert read_curves(POINTS) == FAMILIES
    assert read_curves(POINTS[::-1]) == FAMILIES, "whatever order they come in"


def test_the_text_that_more_tokens_were_taken_from_makes_no_other_curve():
    texts = [{"distillation_text": {"name": "prose", "num_tokens": n}, "weights_sha256": str(n)} for n in (64, 128)]
    points = [curve_point(n, 14.0, distillation=DISTILLED, **text) for n, text in enumerate(texts, 1)]
    assert len(group_curves(points)) == 1


def test_curves_of_one_name_are_told_apart_by_what_differs():
    points = [
        *POINTS,
        curve_point(2, 13.0, distillation={**DISTILLED, "learning_rate": 1e-3, "loss": {"cosine": 0.5}}),
        curve_point(2, 15.5, selection="cosine"),
    ]
    labels = read_curves(points).keys()
    name = "linear replacement + distillation of the maps"
    assert f"{name}, learning_rate=0.0001, cosine=0.0" in labels
    assert f"{name}, learning_rate=0.001, cosine=0.5" in labels
    assert {"linear replacement, selection=linearity", "linear replacement, selection=cosine"} <= labels
    assert {"removal", "removal + distillation of all parameters"} <= labels


def test_the_figure_holds_every_point_with_its_error_and_the_dense_model():
    *curves, dense = perplexity_figure(group_curves(POINTS)).data
    shown = {c.name: list(zip(c.x, c.y, c.error_y.array, strict=True)) for c in curves}
    assert shown == {name: [(x, y, y / 64) for x, y in rows] for name, rows in FAMILIES.items()}
    assert (dense.name, list(dense.x), list(dense.y), dense.error_y.array[0]) == ("dense", [0, 4], [9.87, 9.87], 0.12)
    assert len({c.marker.symbol for c in curves}) == len(curves), "told apart without colour"


@pytest.fixture
def page(tmp_path):
    write_curves_page(tmp_path / "curves.html", "demo", POINTS)
    return tmp_path / "curves.html"


def test_the_page_loads_nothing_and_draws_the_figure(page):
    assert Page(page).loads == []
    assert 4_000_000 < len(page.read_text()) < 8_000_000, "plotly itself is in the page, once"
    assert all(name in drawn(page) for name in FAMILIES)


def test_the_table_leaves_empty_what_was_not_measured(page):
    header, *rows = Page(page).rows
    table = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    assert list(table) == ["0", "2", "4"]
    assert set(table["0"].values()) == {"9.87 ± 0.12"}
    assert [name for name, cell in table["4"].items() if cell] == [f"{REPLACEMENT} + distillation of the maps", "removal"]
    assert table["2"]["removal"] == "20.00 ± 0.31"


def test_each_task_has_a_figure_and_a_table(tmp_path):
    def score(value: float, metric: str) -> TaskScore:
        known = {"num_examples": 200, "standard_error": 0.03, "dense_score": 0.7, "dense_standard_error": 0.02}
        return TaskScore(task="arc_easy", metric=metric, score=value, **known)

    point = POINTS[0].model_copy(update={"tasks": (score(0.4, "acc"), score(0.5, "acc_norm"))})
    write_curves_page(tmp_path / "c.html", "demo", [point, *POINTS[1:]])
    page = Page(tmp_path / "c.html")
    cells = [cell for row in page.rows for cell in row]
    assert cells.count("0.400 ± 0.030") == cells.count("0.500 ± 0.030") == 1
    assert "0.700 ± 0.020" in cells
    assert page.texts.count("arc_easy") == 2
    assert len((tmp_path / "c.html").read_text()) < 8_000_000


def test_names_are_text_and_not_markup(tmp_path, page):
    write_curves_page(tmp_path / "c.html", "<b>&", POINTS)
    assert "<b>&" in "".join(Page(tmp_path / "c.html").texts)
    assert Page(tmp_path / "c.html").tags == Page(page).tags


def test_no_points_give_a_page_that_says_so(tmp_path):
    write_curves_page(tmp_path / "c.html", "demo", [])
    assert "No trial has finished yet." in Page(tmp_path / "c.html").texts
