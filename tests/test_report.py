"""A page needs nothing but a browser, and shows every number beside the dense model's."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import make_point
from shoal.frontier import find_frontier
from shoal.linearity import BlockLinearity
from shoal_services.report import frontier_figure, linearity_figure, write_frontier_page, write_linearity_page

POINTS = [
    make_point(101_000_000, 23.45, kind="folded"),
    make_point(111_000_000, 14.89),
    make_point(112_000_000, 88.88, kind="dropped"),  # dominated
    make_point(121_000_000, 12.34, kind="low_rank", rank=8),
]
FIELDS = [
    "score", "score_without_residual", "ordinary", "ordinary_without_residual", "held_out", "held_out_without_residual",
    "noise_floor", "identity", "norm_ratio", "cosine", "sink_jump",
]  # fmt: skip


def make_scores(num_blocks: int, *, sink_block: int = -1) -> list[BlockLinearity]:
    """Scores that can be told apart: .011, .021, … for block 0."""
    return [
        BlockLinearity(block, **{name: 0.01 * i + 0.001 * (block + 1) for i, name in enumerate(FIELDS[:-1], 1)},
                       sink_jump=99.0 if block == sink_block else 1.0)
        for block in range(num_blocks)
    ]  # fmt: skip


class Page(HTMLParser):
    """A page's title, the cells of its table, and everything that it would load."""

    def __init__(self, path: Path):
        super().__init__()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        # Plotly's own megabytes of code take seconds to parse, and are not ours.
        self.feed(
            re.sub(r"<script([^>]*)>.*?</script>", r"<script\1></script>", path.read_text(encoding="utf-8"), flags=re.S)
        )

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.loads += [value for name in ("src", "srcset", "data", "href") if (value := named.get(name)) and tag != "a"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        inside = self.tags[-1] if self.tags else ""
        if inside in ("td", "th") and self.rows:
            self.rows[-1][-1] += data
        if inside not in ("script", "style"):
            self.texts.append(data)


def drawn(path: Path) -> str:
    """The part of the page that holds the figure's data, without plotly's own code."""
    return path.read_text(encoding="utf-8").rpartition("Plotly.newPlot(")[2]


@pytest.fixture
def frontier_page(tmp_path):
    write_frontier_page(tmp_path / "frontier.html", "demo", POINTS)
    return tmp_path / "frontier.html"


@pytest.fixture
def linearity_page(tmp_path):
    write_linearity_page(tmp_path / "linearity.html", {"tiny": make_scores(4, sink_block=2)})
    return tmp_path / "linearity.html"


@pytest.mark.parametrize("fixture", ["frontier_page", "linearity_page"])
def test_a_page_loads_nothing(fixture, request):
    """No script, style, font, image or frame from anywhere: neither a CDN nor a file beside the page."""
    page = Page(request.getfixturevalue(fixture))
    assert page.loads == []
    assert not {"link", "iframe", "img", "object", "embed"} & set(page.tags)
    text = request.getfixturevalue(fixture).read_text()
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", text.partition("<script")[0])
    assert "Plotly.newPlot(" in text and len(text) > 1_000_000, "plotly itself is in the page"


def test_the_table_is_the_frontier_below_the_dense_model(frontier_page):
    header, *rows = Page(frontier_page).rows
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["parameters"] for row in table] == ["123.4 M", "121.0 M", "111.0 M", "101.0 M"]
    assert [row["perplexity"] for row in table] == ["9.87 ± 0.12", "12.34 ± 0.19", "14.89 ± 0.23", "23.45 ± 0.37"]
    assert [row["kind"] for row in table] == ["", "low_rank", "linear", "folded"]
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
    write_linearity_page(tmp_path / "l.html", {name: make_scores(3)})
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


def test_token_errors_are_columns_where_they_were_measured(tmp_path):
    errors = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]
    write_linearity_page(tmp_path / "l.html", {"tiny": make_scores(2)}, errors)
    header, *rows = Page(tmp_path / "l.html").rows
    assert header[-4:] == ["token error median", "90 %", "99 %", "max"]
    assert [row[-4:] for row in rows] == [[f"{e:.3f}" for e in line] for line in errors]


def test_models_of_different_depth_share_an_axis():
    figure = linearity_figure({"deep": make_scores(5), "flat": make_scores(2), "one": make_scores(1)})
    for name, depths in (("deep", (0, 0.25, 0.5, 0.75, 1)), ("flat", (0, 1)), ("one", (0,))):
        lines = [line for line in figure.data if line.name.startswith(f"{name}: ")]
        assert len(lines) == 6
        assert all(tuple(line.x) == depths for line in lines)


def test_a_perplexity_beyond_all_bounds_still_gives_a_page(tmp_path):
    write_frontier_page(tmp_path / "f.html", "demo", [make_point(100, 1e300), *POINTS])
    assert len(Page(tmp_path / "f.html").rows) == 6
