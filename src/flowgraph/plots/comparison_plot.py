"""The figure of a comparison, drawn with matplotlib on the caller's axes or on new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flowgraph.comparison.compare import Comparison
from flowgraph.display.palette import PALETTE
from flowgraph.errors import InvalidInputError
from flowgraph.plots.drawing import (
    INK,
    FigureSize,
    Label,
    axes_or_new,
    counted,
    drawable,
    finish_axes,
    mark_missing,
    place_labels,
    require_count,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MORE = PALETTE["flow"].light
_LESS = PALETTE["less"].light


def plot_comparison(
    comparison: Comparison, *, ax: Axes | None = None, top: int = 10, size: FigureSize | None = None
) -> Axes:
    """Draw two throughputs along the aligned text, and their difference, second minus first, as bars.

    A unit that only one of the two has breaks the line of the other; a mark at the foot names the one that has it.

    Args:
        comparison: what :func:`flowgraph.compare` found.
        ax: where; new axes by default.
        top: label this many units, the largest changes first; one that fits nowhere without overlap is left out.
        size: of a new figure: ``"single"`` or ``"double"`` column of a paper, or width and height in inches.

    Returns:
        The axes.

    Raises:
        InvalidInputError: an argument outside its range.
        MissingExtraError: matplotlib is not installed.

    Example:
        ``plot_comparison(compare(first, second)).figure.savefig("comparison.png")``
    """
    if not isinstance(comparison, Comparison):
        raise InvalidInputError(
            f"comparison: must be a Comparison, got {type(comparison).__name__}; flowgraph.compare(a, b) makes one"
        )
    require_count("top", top, 0)
    ax = axes_or_new(ax, (10, 4.5), size)

    throughput = comparison.throughput.numpy()
    change = comparison.difference.numpy()
    _draw_changes(ax, change)
    _draw_lines(ax, comparison, throughput)
    ax.axhline(0, color=INK, linewidth=0.7)

    # The lowest bar is negative or absent; equal texts without flow still need a range.
    low = min(change.min(initial=0.0), 0.0)
    high = max(throughput.max(initial=0.0), 1e-12)
    ax.set_ylim(low - 0.06 * (high - low), high * 1.02)
    ax.set_xlim(-0.8, len(throughput) - 0.2)
    unit = "groups of tokens" if comparison.by == "characters" else comparison.by
    ax.set_xlabel(f"aligned {unit}")
    ax.set_ylabel("throughput, and its change")
    finish_axes(ax, f"total variation {comparison.total_variation:.3f}, {comparison.num_matched} matched")

    labels = []
    for place in np.argsort(-np.abs(change), kind="stable")[:top].tolist():
        if change[place]:
            text = f"{drawable(comparison.text(place))} ({change[place]:+.2g})"
            labels.append(Label(place, float(throughput[place].max()), text))
    place_labels(ax, labels)
    return ax


def _draw_changes(ax: Axes, change: np.ndarray) -> None:
    """Draw a pale bar for every change, so that the lines stay visible before it."""
    place = np.arange(len(change))
    for chosen, colour, label in ((change > 0, _MORE, "more in B"), (change < 0, _LESS, "less in B")):
        if chosen.any():
            ax.bar(place[chosen], change[chosen], 0.9, color=colour, alpha=0.45, label=label, linewidth=0)


def _draw_lines(ax: Axes, comparison: Comparison, throughput: np.ndarray) -> None:
    """Draw both throughputs, and mark the units that only one side has."""
    present = comparison.pairs.numpy() >= 0
    place = np.arange(len(throughput))
    # A has the colour of "less in B", and B that of "more in B".
    for side, name, colour, style in ((0, "A", _LESS, "-"), (1, "B", _MORE, "--")):
        is_here = present[:, side]
        is_there = present[:, 1 - side]
        # NaN breaks the line where this side has no unit.
        height = np.where(is_here, throughput[:, side], np.nan)
        label = f"{name}: {drawable(comparison.names[side], 40)}"
        ax.plot(place, height, style, marker=".", markersize=2.5, color=colour, linewidth=0.9, label=label)

        only_here = place[is_here & ~is_there]
        if len(only_here):
            mark_missing(ax, only_here, 0.02, colour, f"only in {name} ({counted(len(only_here), 'unit')})")
