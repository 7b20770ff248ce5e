"""Pages read back, and values that can be told apart on them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from shoal.linearity.profile import Profile
from shoal.linearity.scores import BlockLinearity
from shoal.linearity.token_errors import EDGES, NonlinearToken
from shoal.texts import Text

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


def make_profile(name: str, num_blocks: int) -> Profile:
    """A profile with those scores, equal errors in all blocks, and one token."""
    return Profile(
        model=name, text=Text(name="prose", sha256="0123456789abcdef", num_tokens=4096), scores=make_scores(num_blocks),
        token_errors=[[0.1, 0.2, 0.3, 0.4]] * num_blocks, error_counts=[[1] * (len(EDGES) - 1)] * num_blocks,
        nonlinear_tokens=[NonlinearToken("<b>once</b>", "\n", " upon", 7, 12.5, 2, 0.75)],
    )  # fmt: skip
