"""Axes, colours, labels and saving, shared by all figures.

No function here shows a window or changes a global setting. Token text is data: it is never read as mathematics, and
what cannot be drawn (control characters, or glyphs that no installed font has) is written as a sign or code point.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from flowgraph.display.palette import PALETTE
from flowgraph.display.signs import visible
from flowgraph.errors import InvalidInputError, MissingExtraError
from flowgraph.files import PathLike, atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend
    from matplotlib.patches import Patch
    from matplotlib.text import Text

COLOURS = {name: PALETTE[name].light for name in ("question", "reasoning", "answer", "context")}
"""Colours of the regions on a white background."""
INK = "#333333"
"""Colour of titles, notes and axes."""
FigureSize = Literal["single", "double"] | tuple[float, float]
"""One column or both columns of a two-column paper, or width and height in inches."""
COLUMN_SIZES = {"single": (3.3, 2.2), "double": (6.8, 2.8)}
"""Width and height in inches of the sizes with a name."""
HATCHES = {"question": "////", "reasoning": "", "answer": "----", "context": ""}
"""Hatches of bars: in grey, question and answer have the same lightness."""
_NARROW = 4.5
"""Width of axes in inches below which text is smaller."""
_TEXT_SIZE = 8.0
_NARROW_TEXT_SIZE = 6.5
_LENGTH = 18
"""Characters of a token that a label shows."""
_HEADROOM = 0.45
"""Largest part of the axes that labels may take from the drawing."""
_LEGEND_COLUMNS = 4
_SHORTEST_LABEL = 8
"""Characters to which a label of the legend may be shortened."""
_GAP = 4
"""Least distance of a label from the space of its neighbour, in pixels."""
_OTHER_SCRIPTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Emoji",
    "Arial Unicode MS",
)
"""Common fonts for scripts that the default font lacks."""


class Label(NamedTuple):
    """A text above the drawing, with a line down to what it names.

    Attributes:
        x: place on the axis, in data units.
        start: height where its line starts, in data units.
        text: what it says.
    """

    x: float
    start: float
    text: str


class _PlacedLabel(NamedTuple):
    """A label for which a row was found.

    Attributes:
        label: the label.
        artist: its text on the axes.
        row: its row, counted from the top.
        centre: middle of its text on the axis, in data units.
    """

    label: Label
    artist: Text
    row: int
    centre: float


def axes_or_new(ax: Axes | None, default: tuple[float, float], size: FigureSize | None = None) -> Axes:
    """Return the caller's axes, or new ones.

    Args:
        ax: the caller's axes; None makes new ones. A figure that holds only these axes and has no layout engine gets
            the constrained layout, so that no text is cut at its edge.
        default: width and height of a new figure in inches.
        size: what the caller wants in place of ``default``.

    Raises:
        InvalidInputError: not matplotlib axes, a size that is none, or a size for axes that exist.
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.axes import Axes
    except ImportError as error:
        raise MissingExtraError(
            'figures: need matplotlib, got an environment without it; pip install "flowgraph-llm[plot]"'
        ) from error
    if ax is None:
        inches = default if size is None else _inches(size)
        return pyplot.subplots(figsize=inches, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise InvalidInputError(
            f"ax: must be matplotlib axes, got {type(ax).__name__}; pass one of plt.subplots()[1], or nothing"
        )
    if size is not None:
        raise InvalidInputError(
            f"size: must not be given with ax, whose figure has a size, got {size!r}; "
            "pass figsize= to plt.subplots, or leave ax out"
        )
    figure = ax.figure
    if figure.get_layout_engine() is None and len(figure.axes) == 1:  # type: ignore[union-attr]
        figure.set_layout_engine("constrained")  # type: ignore[union-attr]
    return ax


def _inches(size: FigureSize) -> tuple[float, float]:
    """Read a size as width and height in inches."""
    if isinstance(size, str) and size in COLUMN_SIZES:
        return COLUMN_SIZES[size]
    is_pair = isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2
    if is_pair and all(isinstance(side, int | float) and 1 <= side <= 100 for side in size):
        return float(size[0]), float(size[1])
    raise InvalidInputError(
        f"size: must be 'single', 'double' or width and height in inches from 1 to 100, got {size!r}; "
        "'single' is one column of a paper"
    )


def text_size(ax: Axes) -> float:
    """Return the size of text in points: smaller in axes as narrow as a column of a paper."""
    figure_width = float(ax.figure.get_figwidth())  # type: ignore[union-attr]
    return _NARROW_TEXT_SIZE if ax.get_position().width * figure_width < _NARROW else _TEXT_SIZE


def save_figure(ax: Axes, path: PathLike, *, dpi: int = 160) -> Path:
    """Write the figure of some axes as PNG, SVG or PDF by the ending of the path, atomically.

    The same drawing gives the same SVG: no date is written, and element names follow from the content. Fonts are
    embedded in a PDF as TrueType (Type 42), which publishers ask for and in which text can be searched.

    Args:
        ax: any axes of the figure.
        path: the file; without an ending it is a PNG.
        dpi: pixels per inch of a PNG.

    Returns:
        The path.

    Raises:
        InvalidInputError: an ending that matplotlib does not write.
        OutputError: the path cannot be written.

    Example:
        ``save_figure(plot_throughput(trace), "throughput.svg")``
    """
    import matplotlib

    figure = ax.figure
    kind = Path(path).suffix.removeprefix(".").lower() or "png"
    known = sorted(figure.canvas.get_supported_filetypes())
    if kind not in known:
        raise InvalidInputError(f"path: must end in one of {', '.join(known)}, got {str(path)!r}; use .png or .svg")

    metadata: dict[str, Any] = {}
    if kind == "svg":
        metadata = {"Date": None}
    elif kind == "pdf":
        metadata = {"CreationDate": None}
    settings: dict[Any, Any] = {"svg.hashsalt": "flowgraph", "pdf.fonttype": 42, "ps.fonttype": 42}
    with atomic_write(path) as temporary, matplotlib.rc_context(settings):
        figure.savefig(temporary, format=kind, dpi=dpi, metadata=metadata)  # type: ignore[union-attr]
    return Path(path)


def place_labels(ax: Axes, labels: Sequence[Label]) -> None:
    """Write labels, most important first, into rows above the drawing, so that none overlaps another.

    The upper limit of the axis grows to make room; the lower limit stays. A label that fits into no row is left out.
    """
    if not labels:
        return

    # Text has a size only in pixels, and pixels exist only after the axes have been laid out.
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    axes_box = ax.get_window_extent()
    artists = [_label_text(ax, label) for label in labels]
    boxes = [artist.get_window_extent() for artist in artists]
    row_height = 1.25 * max(box.height for box in boxes)
    num_rows = int(_HEADROOM * axes_box.height // row_height)

    # Each label takes the first row in which it is free of the labels before it.
    rows: list[list[tuple[float, float]]] = [[] for _ in range(num_rows)]
    placed: list[_PlacedLabel] = []
    for label, artist, box in zip(labels, artists, boxes, strict=True):
        middle = ax.transData.transform((label.x, 0))[0]
        rightmost = max(axes_box.x1 - box.width, axes_box.x0)
        left = min(max(middle - box.width / 2, axes_box.x0), rightmost)
        span = (left - _GAP, left + box.width + _GAP)
        row = _first_free_row(rows, span)
        if row is None:
            artist.remove()
            continue
        rows[row].append(span)
        centre = ax.transData.inverted().transform((left + box.width / 2, 0))[0]
        placed.append(_PlacedLabel(label, artist, row, centre))

    # The limits change here, so everything after it measures heights anew.
    num_used = sum(bool(row) for row in rows)
    _raise_upper_limit(ax, (num_used * row_height + 6) / axes_box.height)

    for label, artist, row, centre in placed:
        level = 1 - (row + 0.5) * row_height / axes_box.height
        artist.set_position((centre, level))
        artist.set_bbox({"facecolor": ax.get_facecolor(), "edgecolor": "none", "pad": 0.5})
        foot = (ax.transData.transform((label.x, label.start))[1] - axes_box.y0) / axes_box.height
        ax.plot(
            [label.x, label.x],
            [foot, level],
            color="#BBBBBB",
            linewidth=0.6,
            transform=ax.get_xaxis_transform(),
            zorder=1.5,
        )


def _label_text(ax: Axes, label: Label) -> Text:
    """Add the text of a label at the upper edge, where its size can be measured."""
    return ax.text(
        label.x,
        1,
        label.text,
        transform=ax.get_xaxis_transform(),
        fontsize=text_size(ax),
        fontfamily=font_families(),
        parse_math=False,
        ha="center",
        va="center",
    )


def _first_free_row(rows: Sequence[Sequence[tuple[float, float]]], span: tuple[float, float]) -> int | None:
    """Find the first row whose spans, in pixels, do not overlap this one; None if there is no such row."""
    for number, taken in enumerate(rows):
        if all(span[1] <= left or span[0] >= right for left, right in taken):
            return number
    return None


def _raise_upper_limit(ax: Axes, share: float) -> None:
    """Raise the upper limit until the drawing leaves this share of the axes free, without ticks in the free part."""
    low, high = ax.get_ylim()
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]

    # The axis may have a root scale: the share refers to heights on paper, hence to transformed values.
    scale = ax.yaxis.get_transform()
    bottom, top = scale.transform([low, high])
    kept = max(1 - share, 1 - _HEADROOM)
    raised = scale.inverted().transform([bottom + (top - bottom) / kept])[0]
    ax.set_ylim(low, float(raised))
    ax.set_yticks(ticks)
    ax.spines["left"].set_bounds(low, high)


def finish_axes(ax: Axes, title: str) -> None:
    """Add the title and a legend above the drawing, where they cover nothing and fit its width; remove the box."""
    points = text_size(ax)
    ax.spines[["top", "right"]].set_visible(False)
    if points < _TEXT_SIZE:
        ax.tick_params(labelsize=points)
        ax.xaxis.label.set_fontsize(points)
        ax.yaxis.label.set_fontsize(points)
    # The layout may move the spines once it is known how much the labels take.
    right = _right_limit(ax)
    width = right - ax.get_window_extent().x0 - _GAP
    legend = _fitting_legend(ax, points, width)
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    _wrap_height_label(ax)
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    excess = legend.get_window_extent().x1 - _right_limit(ax)
    if excess > 0:
        width -= excess + _GAP
        legend = _fitting_legend(ax, points, width)

    # The title is above the legend.
    dots_per_point = float(ax.figure.dpi) / 72  # type: ignore[union-attr]
    legend_height = legend.get_window_extent().height / dots_per_point
    text = ax.set_title(
        title,
        loc="left",
        fontsize=points + 1,
        color=INK,
        parse_math=False,
        fontfamily=font_families(),
        pad=legend_height + 2,
    )
    extent = text.get_window_extent().width
    if extent > width:
        longest = max(len(line) for line in title.split("\n"))
        room = max(int(longest * width / extent), 1)
        text.set_text("\n".join(part for line in title.split("\n") for part in textwrap.wrap(line, room)))


def _right_limit(ax: Axes) -> float:
    """Return how far to the right title and legend may reach, in pixels: the edge of the figure, or of the panel.

    Where other axes stand to the right, a wider legend would cover them, and the constrained layout would shrink both
    panels to make room for it.
    """
    own = ax.get_window_extent()
    others = [other.get_window_extent() for other in ax.figure.axes if other is not ax]
    if any(other.x0 >= own.x1 for other in others):
        return float(own.x1)
    return float(ax.figure.bbox.width)


def _fitting_legend(ax: Axes, points: float, width: float) -> Legend:
    """Add a legend with as many columns as fit a width in pixels; a label that fits no column is shortened."""
    # Handles are passed on: matplotlib warns where it searches for them and finds none.
    handles, labels = ax.get_legend_handles_labels()
    columns = _LEGEND_COLUMNS
    while True:
        legend = ax.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=columns,
            frameon=False,
            fontsize=points,
            borderaxespad=0.2,
            handlelength=1.4,
            labelspacing=0.3,
        )
        texts = legend.get_texts()
        for text, label in zip(texts, labels, strict=True):
            text.set_text(label)
            text.set_parse_math(False)
            text.set_fontfamily(font_families())
        extent = legend.get_window_extent().width
        longest = max((len(label) for label in labels), default=0)
        if extent <= width or (columns == 1 and longest <= _SHORTEST_LABEL):
            return legend
        if columns > 1:
            columns -= 1
            continue
        room = max(int(longest * width / extent) - 1, _SHORTEST_LABEL)
        room = min(room, longest - 1)
        labels = [label if len(label) <= room else label[: room - 1] + "…" for label in labels]


def _wrap_height_label(ax: Axes) -> None:
    """Break the label of the vertical axis at its commas where it is longer than the axis."""
    label = ax.yaxis.label
    if label.get_window_extent().height > 0.6 * ax.get_window_extent().height:
        label.set_text(label.get_text().replace(", ", ",\n"))


def thin_ticks(ax: Axes) -> None:
    """Leave out ticks of the vertical axis whose labels would overlap those of higher ticks; 0 stays."""
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    dots_per_point = float(ax.figure.dpi) / 72  # type: ignore[union-attr]
    distance = 1.15 * text_size(ax) * dots_per_point
    kept: list[float] = []
    heights: list[float] = []
    # The highest tick says where the scale ends, and 0 where it starts.
    ticks = sorted(ax.get_yticks(), reverse=True)
    for tick in [*ticks[:1], *ticks[:0:-1][:1], *ticks[1:-1]]:
        height = float(ax.transData.transform((0, tick))[1])
        if all(abs(height - other) >= distance for other in heights):
            kept.append(float(tick))
            heights.append(height)
    ax.set_yticks(sorted(kept))


def mark_regions(ax: Axes, regions: Sequence[str]) -> None:
    """Draw a strip below the axis in the colours of the regions, one token exactly, and a pale tint above it."""
    from matplotlib.patches import Rectangle

    changes = [token for token in range(1, len(regions)) if regions[token] != regions[token - 1]]
    for start, stop in pairwise([0, *changes, len(regions)]):
        region = regions[start]
        if region == "context":
            continue
        strip = Rectangle(
            (start - 0.5, -0.035),
            stop - start,
            0.025,
            color=COLOURS[region],
            linewidth=0,
            transform=ax.get_xaxis_transform(),
            clip_on=False,
        )
        mark_by_hatch(strip, region)
        ax.add_patch(strip)
        ax.axvspan(start - 0.5, stop - 0.5, color=COLOURS[region], alpha=0.06, linewidth=0, zorder=0)
    ax.tick_params(axis="x", pad=8)


def mark_by_hatch(patch: Patch, region: str) -> None:
    """Hatch a bar or strip in white by its region, so that regions can be told apart in grey."""
    if HATCHES[region]:
        patch.set_edgecolor("white")
        patch.set_hatch(HATCHES[region])


def mark_missing(ax: Axes, places: np.ndarray, height: float, colour: str, label: str) -> None:
    """Draw a small mark near the lower edge for every place without a point on its curve.

    Args:
        ax: where.
        places: integers on the axis.
        height: share of the height of the axes.
        colour: of the curve.
        label: of the legend.
    """
    ax.plot(
        places,
        np.full(len(places), height),
        "|",
        color=colour,
        markersize=5,
        clip_on=False,
        transform=ax.get_xaxis_transform(),
        label=label,
    )


def font_families() -> list[str]:
    """List the fonts of the caller's settings, then the installed ones for scripts that those lack."""
    import matplotlib
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    own = list(matplotlib.rcParams["font.family"])
    others = [name for name in _OTHER_SCRIPTS if name in installed and name not in own]
    return own + others


def drawable(text: str, length: int = _LENGTH) -> str:
    """Write text as one line without a missing glyph.

    Invisible characters become signs, and characters that no font draws become code points.

    Args:
        text: any text.
        length: characters shown; a longer text ends in an ellipsis.
    """
    from matplotlib import font_manager

    fonts = []
    for family in font_families():
        properties = font_manager.FontProperties(family=[family])
        fonts.append(font_manager.get_font(font_manager.findfont(properties)))

    text = text.strip(" ") or "␣" * len(text)
    parts: list[str] = []
    size = 0
    for character in text:
        shown = visible(character)
        has_glyphs = all(any(font.get_char_index(ord(part)) for font in fonts) for part in shown)
        if not has_glyphs:
            shown = f"<U+{ord(character):04X}>"
        # A sign or code point is never cut in its middle.
        if size + len(shown) > length:
            return "".join(parts) + "…"
        parts.append(shown)
        size += len(shown)
    return "".join(parts)


def counted(number: int, noun: str) -> str:
    """Write a number with its noun, in the plural unless it is 1."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}s"


def require_count(name: str, value: object, least: int) -> None:
    """Check that an argument is an integer of at least ``least``; booleans are not accepted.

    Raises:
        InvalidInputError: any other value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInputError(
            f"{name}: must be an integer of at least {least}, got {value!r}; omit it for the default"
        )
