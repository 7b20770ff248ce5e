"""What every page is made of. A page needs nothing but a browser: no CDN, no server."""

from __future__ import annotations

import html

import plotly.graph_objects as go

# Okabe and Ito's palette: told apart by colour-blind readers too.
PALETTE = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7")
# In rem; the widest fits a screen of 1,200 pixels.
TABLE_WIDTHS = (30, 45, 60, 72)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 73rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
h1, h2, .note { overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #ddd } td { white-space: pre }
td.text:not(:first-child) { white-space: pre-line }
th { border-bottom: 2px solid #888; vertical-align: bottom }
td:first-child, th:first-child { text-align: left } tr.pick { background: #eef6fb } .scroll { overflow-x: auto }
p.note { color: #555; max-width: 46rem }
"""
# Where the screen is narrower than the table, its rows stand below each other, a line for each value.
STACKED = """
@media (max-width: WIDTH) { table.NAME, .NAME tbody, .NAME tr { display: block } .NAME thead { display: none }
  .NAME tr { border-bottom: 2px solid #888; padding: .4rem 0 } .NAME td { display: flex; justify-content: space-between;
  gap: 1rem; white-space: pre-line; overflow-wrap: anywhere } .NAME td::before { content: attr(data-label); color: #555 }
  .NAME td:empty { display: none } }
"""
STYLE += "".join(STACKED.replace("NAME", f"stack-{width}").replace("WIDTH", f"{width}rem") for width in TABLE_WIDTHS)


def make_table(header: list[str], rows: list[list[str]], marked: list[bool]) -> str:
    """Cells are text, and escaped; marked rows stand out."""
    head = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=pick' if mark else ''}>{''.join(map(_write_cell, header, row))}</tr>"
        for row, mark in zip(rows, marked, strict=True)
    )
    width = _estimate_width([header, *rows])
    stack = next((bound for bound in TABLE_WIDTHS if width <= bound), TABLE_WIDTHS[-1])
    table = f"<table class='stack-{stack}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll'>{table}</div>"


def _write_cell(label: str, cell: str) -> str:
    kind = " class=text" if _is_text(cell) else ""
    return f"<td{kind} data-label='{html.escape(label)}'>{html.escape(cell)}</td>"


def _is_text(cell: str) -> bool:
    """Whether a cell may be broken between its words, as numbers may not."""
    return cell[:1].isalpha()


def _estimate_width(rows: list[list[str]]) -> float:
    """What a table takes in rem: .55 a character, and 1 between columns."""
    widths = []
    for column in zip(*rows, strict=True):
        header, *cells = column
        pieces = [*header.split(), *(piece for cell in cells for piece in cell.split(None if _is_text(cell) else "\n"))]
        widths.append(0.55 * max(map(len, pieces), default=0) + 1)
    return sum(widths)


def draw(figure: go.Figure, *, with_library: bool = True) -> str:
    """The figure as HTML. A page's first figure brings plotly's code, the others use it."""
    return figure.to_html(full_html=False, include_plotlyjs=with_library, config={"displaylogo": False, "responsive": True})


def make_page(title: str, sections: list[str]) -> str:
    """A whole page of sections in HTML."""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(sections)}</body></html>"
    )
