"""Parts of the HTML fragments that a notebook shows: escaped text, percentages, bars, tables, folded parts.

A fragment has no script, and its style is inline, because notebook viewers remove both scripts and style sheets; where
they remove inline style too, texts and numbers remain. Text is data: it is escaped, and invisible characters become
signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Literal

from flowgraph.display.palette import PALETTE, rgba
from flowgraph.display.signs import visible

MAX_CHARACTERS = 80
"""Characters of one token or one name that are shown."""
FULL_OPACITY = 0.75
"""Opacity of the strongest colour: at most this much of it is light enough for black text on white, and dark enough
for white text on black."""
REGION_STYLES = {
    "question": f"border-bottom:2px solid {PALETTE['question'].light}",
    "reasoning": "",
    "answer": f"outline:2px solid {PALETTE['answer'].light};outline-offset:-1px",
    "context": "opacity:.65",
}
"""How the text of a region is marked."""
_BAR_WIDTH = 8
"""Width of the bar of a whole, in em."""


def fragment(*parts: str) -> str:
    """Join parts into one fragment, whose classes keep a notebook's MathJax from reading dollar signs as formulas."""
    style = "max-width:60em;line-height:1.6;text-align:left"
    return f'<div class="tex2jax_ignore mathjax_ignore" style="{style}">{"".join(parts)}</div>'


def escaped(text: str, length: int = MAX_CHARACTERS) -> str:
    """Escape a text, replace its invisible characters by signs, and cut it after ``length`` characters."""
    if len(text) > length:
        text = text[:length] + "…"
    return escape(visible(text))


def one_line(text: str, length: int = MAX_CHARACTERS) -> str:
    """Escape a text with every run of blanks as one space, so that several lines stand in one table cell."""
    line = " ".join(text.split())
    return f"<bdi>{escaped(line or text, length)}</bdi>"


def percent(share: float) -> str:
    """Write a share as a percentage with three digits; a share below 1 by more than rounding is 99.9 %, not 100 %."""
    text = f"{100 * share:.3g}"
    if text == "100" and share < 1 - 1e-12:
        return "99.9 %"
    return f"{text} %"


def heat(opacity: float) -> str:
    """Return the colour of flow with this opacity as CSS."""
    return rgba(PALETTE["flow"].light, round(opacity, 2))


def bar(share: float, colour: Literal["flow", "less"] = "flow") -> str:
    """Draw a share of [0, 1] as a bar in the colour of flow, or of less flow."""
    width = _BAR_WIDTH * min(max(share, 0.0), 1.0)
    shade = rgba(PALETTE[colour].light, FULL_OPACITY)
    return f'<span style="display:inline-block;height:.7em;width:{width:.2f}em;background-color:{shade}"></span>'


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = ()) -> str:
    """Write a table; cells are HTML.

    Args:
        headings: of the columns.
        rows: cells of each row.
        left: the headings of columns aligned at the left; the others hold numbers and are aligned at the right.
    """
    sides = ["left" if heading in left else "right" for heading in headings]
    head = "".join(_cell("th", heading, side) for heading, side in zip(headings, sides, strict=True))
    body = []
    for row in rows:
        cells = "".join(_cell("td", cell, side) for cell, side in zip(row, sides, strict=True))
        body.append(f"<tr>{cells}</tr>")
    return f'<table style="margin:.4em 0"><tr>{head}</tr>{"".join(body)}</table>'


def _cell(tag: Literal["th", "td"], content: str, side: str) -> str:
    """Write one cell of a table."""
    return f'<{tag} style="text-align:{side};vertical-align:top;padding:0 .5em">{content}</{tag}>'


def folded(summary: str, content: str, *, is_open: bool = False) -> str:
    """Write HTML that a click opens below its summary; a viewer that knows no such element shows both."""
    state = " open" if is_open else ""
    return f"<details{state}><summary>{summary}</summary>{content}</details>"
