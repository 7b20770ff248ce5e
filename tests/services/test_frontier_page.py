"""A page needs nothing but a browser, and shows every number beside the dense model's."""

from __future__ import annotations

import math
import re

import pytest
from conftest import make_point
from hypothesis import given
from hypothesis import strategies as st
from pages import Page, drawn, make_profile, make_scores
from shoal.frontier import find_frontier
from shoal_services.pages.axes import find_ticks, log_axis
from shoal_services.pages.frontier_page import frontier_figure, write_frontier_page
from shoal_services.pages.linearity_page import comparison_figure, mean_figure, write_comparison_page, write_linearity_page

POINTS = [
    make_point(101_000_000, 23.45, kind="folded"),
    make_point(111_000_000, 14.89),
    make_point(112_000_000, 88.88, kind="dropped"),  # dominated
    make_point(121_000_000, 12.34, kind="low_rank", rank=8),
]


@pytest.fixture
def frontier_page(tmp_path):
    write_frontier_page(tmp_path / "frontier.html", "demo", POINTS)
    return tmp_path / "frontier.html"


@pytest.fixture
def linearity_page(tmp_path):
    write_linearity_page(tmp_path / "linearity.html", "tiny", make_scores(4, sink_block=2))
    return tmp_path / "linearity.html"


@pytest.fixture
def profile_page(tmp_path):
    profile = make_profile("tiny", 3)
    write_linearity_page(tmp_path / "profile.html", "tiny", profile.scores, profile)
    return tmp_path / "profile.html"


@pytest.fixture
def comparison_page(tmp_path):
    write_comparison_page(tmp_path / "compared.html", [make_profile("before", 3), make_profile("after", 5)])
    return tmp_path / "compared.html"


@pytest.mark.parametrize("fixture", ["frontier_page", "linearity_page", "profile_page", "comparison_page"])
def test_a_page_loads_nothing(fixture, request):
    """No script, style, font, image or frame from anywhere: neither a CDN nor a file beside the page."""
    page = Page(request.getfixturevalue(fixture))
    assert page.loads == []
    assert not {"link", "iframe", "img", "object", "embed"} & set(page.tags)
    text = request.getfixturevalue(fixture).read_text()
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", text.partition("<script")[0])
    assert "Plotly.newPlot(" in text and 4_000_000 < len(text) < 8_000_000, "plotly itself is in the page, once"


def test_the_table_is_the_frontier_below_the_dense_model(frontier_page):
    header, *rows = Page(frontier_page).rows
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["parameters"] for row in table] == ["123.4 M", "121.0 M", "111.0 M", "101.0 M"]
    assert [row["perplexity"] for row in table] == ["9.87 ± 0.12", "12.34 ± 0.19", "14.89 ± 0.23", "23.45 ± 0.37"]
    assert [row["kind"] for row in table] == ["", "low_rank", "linear", "folded"]
    assert [row["MB"] for row in table] == ["493.6", "484.0", "444.0", "404.0"], "as saved"
    ratio = 14.89 / 9.87
    assert [table[0]["ratio to dense"], table[2]["ratio to dense"]] == ["1", f"{ratio:.3f} ± {ratio * 0.03:.3f}"]
    assert [row["decode speed"] for row in table] == ["1", "× 1.50", "× 1.50", "× 1.50"]
    assert [row[""] for row in table] == ["dense", "best", "balanced", "smallest"]


def test_the_note_says_on_what_it_was_measured(frontier_page):
    text = " ".join(Page(frontier_page).texts)
    assert "prose, 16,384 tokens (sha256 01234567), float32 on cpu" in text
    assert "one standard error" in text


def test_the_figure_holds_every_point_with_its_error_and_the_dense_model():
    figure = frontier_figure(POINTS, find_frontier(POINTS))
    line, *groups = figure.data
    assert list(zip(line.x, line.y, strict=True)) == [(101.0, 23.45), (111.0, 14.89), (121.0, 12.34)]
    shown = {(x, y): error for g in groups for x, y, error in zip(g.x, g.y, g.error_y.array, strict=True)}
    assert shown == {(p.num_parameters / 1e6, p.perplexity): p.evaluations[0].standard_error for p in POINTS} | {
        (123.4, 9.87): 0.12
    }
    assert {g.name for g in groups} == {"folded", "linear", "dropped", "low_rank", "dense"}
    assert len({g.marker.symbol for g in groups}) == 5, "told apart without colour"


def test_the_page_draws_the_figure(frontier_page):
    for point in POINTS:
        assert f"perplexity {point.perplexity:.2f} \\u00b1 {point.perplexity / 64:.2f}" in drawn(frontier_page)


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a&b", '"quoted"', "</title><b>"])
def test_names_are_text_and_not_markup(tmp_path, name):
    write_frontier_page(tmp_path / "f.html", name, POINTS)
    write_linearity_page(tmp_path / "l.html", name, make_scores(3))
    plain = tmp_path / "plain.html"
    write_frontier_page(plain, "plain", POINTS)
    for file in (tmp_path / "f.html", tmp_path / "l.html"):
        page = Page(file)
        assert sum(name in text for text in ["".join(page.texts)]) == 1
        assert page.tags.count("script") == Page(plain).tags.count("script")
        assert "b" not in page.tags


def test_text_names_are_text_too(tmp_path):
    point = make_point(100, 12.0)
    text = point.evaluations[0].text.model_copy(update={"name": "<img src=x>"})
    point = point.model_copy(update={"evaluations": (point.evaluations[0].model_copy(update={"text": text}),)})
    write_frontier_page(tmp_path / "f.html", "demo", [point])
    assert "img" not in Page(tmp_path / "f.html").tags


def test_no_points_give_a_page_that_says_so(tmp_path):
    write_frontier_page(tmp_path / "f.html", "demo", [])
    page = Page(tmp_path / "f.html")
    assert "No trial has finished yet." in page.texts
    assert page.rows == page.loads == []


def test_one_point_is_all_three_picks(tmp_path):
    write_frontier_page(tmp_path / "f.html", "demo", POINTS[:1])
    assert [row[0] for row in Page(tmp_path / "f.html").rows] == ["", "dense", "best"]


def test_every_block_stands_in_the_linearity_table(linearity_page):
    header, *rows = Page(linearity_page).rows
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["block"] for row in table] == ["0", "1", "2", "3"]
    assert [row["held out"] for row in table] == ["0.0510", "0.0520", "0.0530", "0.0540"]
    assert [row["all tokens"] for row in table] == ["0.0110", "0.0120", "0.0130", "0.0140"]
    assert [row["sinks"] for row in table] == ["", "", "moves them", ""]


def test_token_errors_are_columns_where_they_were_measured(profile_page):
    header, *rows = Page(profile_page).rows
    assert header[-4:] == ["token error median", "90 %", "99 %", "max"]
    assert [row[-4:] for row in rows[:3]] == [["0.100", "0.200", "0.300", "0.400"]] * 3


def test_the_least_linear_tokens_stand_in_their_text(profile_page):
    header, row = Page(profile_page).rows[-2:]
    assert dict(zip(header, row, strict=True)) == {
        "token": "⏎", "text before": "<b>once</b>", "text after": " upon", "place in the window": "7",
        "× median error": "12.5", "worst block": "2", "error there": "0.750",
    }  # fmt: skip


def test_models_of_different_depth_share_an_axis():
    figure = comparison_figure([make_profile("deep", 5), make_profile("flat", 2), make_profile("one", 1)])
    for name, depths in (("deep", (0, 0.25, 0.5, 0.75, 1)), ("flat", (0, 1)), ("one", (0,))):
        lines = [line for line in figure.data if line.name.partition(",")[0] == name]
        assert [line.line.dash for line in lines] == ["solid", "dash"]
        assert all(tuple(line.x) == depths for line in lines)


def test_a_comparison_shows_means_and_their_change(comparison_page):
    header, before, after = Page(comparison_page).rows
    assert header[:6] == ["model", "blocks", "mean", "change", "w/o residual", "change"]
    assert before[:6] == ["before", "3", "0.0120", "+0.0000", "0.0220", "+0.0000"]
    assert after[:6] == ["after", "5", "0.0130", "+0.0010", "0.0230", "+0.0010"]
    assert list(mean_figure([make_profile("b", 3), make_profile("a", 5)]).data[0].x) == ["b", "a"], "in the order given"


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a&b", "</title><b>"])
def test_names_in_a_comparison_are_text_too(tmp_path, name, comparison_page):
    write_comparison_page(tmp_path / "c.html", [make_profile(name, 2), make_profile("other", 2)])
    page = Page(tmp_path / "c.html")
    assert name in "".join(page.texts) and "b" not in page.tags
    assert page.tags.count("script") == Page(comparison_page).tags.count("script")


def test_a_perplexity_beyond_all_bounds_still_gives_a_page(tmp_path):
    write_frontier_page(tmp_path / "f.html", "demo", [make_point(100, 1e300), *POINTS])
    assert len(Page(tmp_path / "f.html").rows) == 6


def test_what_was_done_to_the_weights_is_told_apart(tmp_path):
    changes = (
        {},
        {"sparsity": "2:4"},
        {"weight_share": 0.8},
        {"weight_share": 0.8, "sparsity": 0.5, "num_replaced": 0, "blocks": ()},
    )
    points = [make_point(100_000_000 + n, 30.0 - n, **change) for n, change in enumerate(changes)]
    _, *groups, dense = frontier_figure(points, find_frontier(points)).data
    assert [g.name for g in groups] == ["linear", "linear, SVD", "linear, sparse", "linear, SVD, sparse"]
    assert len({g.marker.symbol for g in (*groups, dense)}) == 5
    write_frontier_page(tmp_path / "f.html", "demo", points)
    header, _, *rows = Page(tmp_path / "f.html").rows
    assert [row[header.index("weights")] for row in rows] == ["SVD 80 %, 50 % sparse", "SVD 80 %", "2:4 sparse", ""]
    assert [row[header.index("kind")] for row in rows] == ["", "linear", "linear", "linear"]


@given(st.floats(1e-6, 1e6), st.floats(1.001, 1e9))
def test_a_log_axis_has_four_numbers_or_more_on_it(low, ratio):
    ticks = find_ticks(low, low * ratio)
    assert 4 <= len(ticks) <= 12 and ticks == sorted(set(ticks))
    assert low <= ticks[0] and ticks[-1] <= low * ratio


def test_a_log_axis_between_6_and_8_says_so():
    axis = log_axis("perplexity", [6.1, 7.9])
    assert axis["ticktext"] == ["6", "6.5", "7", "7.5", "8"]
    assert axis["range"][0] < math.log10(6) and math.log10(8) < axis["range"][1]
    assert log_axis("perplexity", [9, 300_000])["ticktext"] == ["10", "100", "1,000", "10,000", "100,000"]
    assert log_axis("perplexity", [6.5])["ticktext"] and log_axis("perplexity", [math.inf, 0])["ticktext"]


def test_the_axes_of_a_page_hold_what_is_drawn():
    figure = frontier_figure(POINTS, find_frontier(POINTS))
    low, high = (10**bound for bound in figure.layout.yaxis.range)
    for group in figure.data[1:]:
        for value, error in zip(group.y, group.error_y.array, strict=True):
            assert low < value - error and value + error < high


def test_every_cell_of_a_page_says_what_it_is(frontier_page):
    """Where the screen is narrow, there is no header above it."""
    text = frontier_page.read_text()
    assert text.count("data-label='perplexity'") == 4
    assert re.search(r"<table class='stack-\d+'>", text) and "content: attr(data-label)" in text
