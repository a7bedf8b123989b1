"""The entries of the gallery, read from the scripts in docs/gallery and what their last run gave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "gallery"
SECTIONS = {
    "Read one answer": ("throughput", "steps", "paper_figure"),
    "Choose what an edge weighs": ("relevance_beside_flow", "edge_by_head", "sensitivity"),
    "Test an explanation": ("hub_knockout", "compare_answers", "evaluation"),
    "Check the numbers": ("certificate", "max_flow"),
    "Many texts, and training": ("corpus", "token_credit"),
}
"""Scripts by section, in the order in which they are shown."""

_TEXT = "# %% [markdown]"
_CODE = "# %%"


@dataclass(frozen=True)
class Cell:
    """One cell of a script.

    Attributes:
        is_text: whether it is Markdown.
        source: Markdown without the signs of a comment, or Python.
    """

    is_text: bool
    source: str


@dataclass(frozen=True)
class Entry:
    """One entry of the gallery.

    Attributes:
        name: of its script and of its picture.
        title: the heading of the script.
        point: the paragraph below the heading.
        cells: the cells after these two.
        output: what the script printed.
        seconds: processor time of the script, without loading the demo model; None before its first run.
    """

    name: str
    title: str
    point: str
    cells: tuple[Cell, ...]
    output: str
    seconds: float | None


def entry_names() -> list[str]:
    """List all entries in the order of the sections."""
    return [name for names in SECTIONS.values() for name in names]


@cache
def find_entry(name: str) -> Entry:
    """Read an entry.

    Raises:
        ValueError: the script does not begin with a cell of a heading and a paragraph.
    """
    first, *cells = cells_of((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    heading, _, rest = first.source.partition("\n")
    if not first.is_text or not heading.startswith("# ") or not rest.strip():
        raise ValueError(f"{name}.py: must begin with a Markdown cell of a heading and a paragraph, got {heading!r}")
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))["entries"].get(name, {})
    return Entry(
        name=name,
        title=heading.removeprefix("# "),
        point=" ".join(rest.split()),
        cells=tuple(cells),
        output=results.get("output", ""),
        seconds=results.get("seconds"),
    )


def cells_of(script: str) -> list[Cell]:
    """Split a script in the percent format into its cells.

    Args:
        script: its text, which begins with a cell.

    Example:
        >>> cells_of("# %% [markdown]\\n# # A\\n\\n# %%\\nprint(1)\\n")
        [Cell(is_text=True, source='# A'), Cell(is_text=False, source='print(1)')]
    """
    cells: list[Cell] = []
    is_text = False
    lines: list[str] = []
    for line in [*script.splitlines(), _CODE]:
        if line not in (_TEXT, _CODE):
            lines.append(line)
            continue
        source = "\n".join(line.removeprefix("#").removeprefix(" ") if is_text else line for line in lines).strip()
        if source:
            cells.append(Cell(is_text, source))
        is_text = line == _TEXT
        lines = []
    return cells


def cards(names: Sequence[str], root: str, *, with_points: bool = True) -> list[str]:
    """Return the Markdown of a grid of thumbnails, each a link to its entry.

    Args:
        names: the entries.
        root: way from the page to the folder of the documentation, such as ``"../../"``.
        with_points: whether the point of an entry stands below its title.
    """
    lines = ['<div class="gallery" markdown>', ""]
    for name in names:
        entry = find_entry(name)
        # The title beside the picture says what it is, so the picture itself has no other text.
        picture = f"![]({root}images/gallery/{name}.svg){{ loading=lazy }}"
        text = f" **{entry.title}**" + (f" *{entry.point}*" if with_points else "")
        lines += [f"[{picture}{text}]({root}gallery/{name}.md)", ""]
    return [*lines, "</div>", ""]
