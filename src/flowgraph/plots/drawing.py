"""What the figures share: colours, frame and regions, and token text as labels that never overlap."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from flowgraph.pages.palette import PALETTE
from flowgraph.pages.signs import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {name: PALETTE[name].light for name in ("question", "reasoning", "answer", "context")}
"""Colours of the regions on a white ground."""
INK = "#333333"
_LENGTH = 18
"""Characters of a token that a label shows."""
_HEADROOM = 0.45
"""Largest part of the axes that labels may take from the drawing."""
_OTHER_SCRIPTS = (
    "DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "PingFang SC", "Microsoft YaHei",
    "Yu Gothic", "Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji", "Arial Unicode MS",
)  # fmt: skip


def place_labels(ax: Axes, labels: Sequence[tuple[float, float, str]]) -> None:
    """Write labels, (x, height that its line starts from, text), most important first, into rows above the drawing.

    The upper limit of the axis grows to make room; the lower one stays. A label that finds no room is left out.
    """
    if not labels:
        return
    style: dict[str, Any] = {
        "fontsize": 8,
        "fontfamily": families(),
        "parse_math": False,
        "ha": "center",
        "va": "center",
    }
    across = ax.get_xaxis_transform()
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]  # lays the axes out, so that pixels can be measured
    frame = ax.get_window_extent()
    texts = [ax.text(x, 1, text, transform=across, **style) for x, _, text in labels]
    boxes = [text.get_window_extent() for text in texts]
    height = 1.25 * max(box.height for box in boxes)
    rows: list[list[tuple[float, float]]] = [[] for _ in range(int(_HEADROOM * frame.height // height))]
    placed = []
    for text, box, (x, start, _) in zip(texts, boxes, labels, strict=True):
        middle = ax.transData.transform((x, 0))[0]
        left = min(max(middle - box.width / 2, frame.x0), max(frame.x1 - box.width, frame.x0))
        span = (left - 4, left + box.width + 4)
        row = next((k for k, taken in enumerate(rows) if all(span[1] <= a or span[0] >= b for a, b in taken)), None)
        if row is None:
            text.remove()
            continue
        rows[row].append(span)
        placed.append((text, row, x, start, ax.transData.inverted().transform((left + box.width / 2, 0))[0]))
    _make_room(ax, (sum(map(bool, rows)) * height + 6) / frame.height)
    for text, row, x, start, centre in placed:
        level = 1 - (row + 0.5) * height / frame.height
        text.set_position((centre, level))
        text.set_bbox({"facecolor": ax.get_facecolor(), "edgecolor": "none", "pad": 0.5})
        foot = (ax.transData.transform((x, start))[1] - frame.y0) / frame.height
        ax.plot([x, x], [foot, level], color="#BBBBBB", linewidth=0.6, transform=across, zorder=1.5)


def _make_room(ax: Axes, share: float) -> None:
    """Raise the upper limit until the drawing leaves this share of the axes free; no tick is above the drawing."""
    low, high = ax.get_ylim()
    scale = ax.yaxis.get_transform()
    bottom, top = scale.transform([low, high])
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
    ax.set_ylim(low, float(scale.inverted().transform([bottom + (top - bottom) / max(1 - share, 1 - _HEADROOM)])[0]))
    ax.set_yticks(ticks)
    ax.spines["left"].set_bounds(low, high)


def frame(ax: Axes, title: str) -> None:
    """Title, legend above the drawing where it covers nothing, and no box."""
    ax.spines[["top", "right"]].set_visible(False)
    legend = ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8, borderaxespad=0.2, handlelength=1.4
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_fontfamily(families())
    rows = -(-len(legend.get_texts()) // 4)
    ax.set_title(title, loc="left", fontsize=9, color=INK, parse_math=False, fontfamily=families(), pad=8 + 14 * rows)


def mark_regions(ax: Axes, regions: Sequence[str]) -> None:
    """A strip under the axis in the colours of the regions, at token precision, and a pale tint over their width."""
    from matplotlib.patches import Rectangle

    edges = [0, *(i for i in range(1, len(regions)) if regions[i] != regions[i - 1]), len(regions)]
    for start, stop in pairwise(edges):
        if regions[start] == "context":
            continue
        colour, across = COLOURS[regions[start]], ax.get_xaxis_transform()
        box = Rectangle(
            (start - 0.5, -0.035), stop - start, 0.025, color=colour, linewidth=0, transform=across, clip_on=False
        )
        ax.add_patch(box)
        ax.axvspan(start - 0.5, stop - 0.5, color=colour, alpha=0.06, linewidth=0, zorder=0)
    ax.tick_params(axis="x", pad=8)


def families() -> list[str]:
    """The reader's own fonts, then installed ones for the scripts that those lack."""
    import matplotlib
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    own = list(matplotlib.rcParams["font.family"])
    return own + [name for name in _OTHER_SCRIPTS if name in installed and name not in own]


def drawable(text: str, length: int = _LENGTH) -> str:
    """One line without a missing glyph: signs for invisible characters, code points for what no font draws."""
    from matplotlib import font_manager

    fonts = [font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=[f]))) for f in families()]
    text = text.strip(" ") or "␣" * len(text)
    parts, size = [], 0
    for character in text:
        shown = visible(character)
        has_glyphs = all(any(font.get_char_index(ord(part)) for font in fonts) for part in shown)
        if not has_glyphs:
            shown = f"<U+{ord(character):04X}>"
        if size + len(shown) > length:
            return "".join(parts) + "…"
        parts.append(shown)
        size += len(shown)
    return "".join(parts)
