"""Plot the multipliers of all arms as horizontal intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flowgraph import atomic_write
from rl.alignment.multipliers import Alignment, Estimate
from rl.evaluation.significance import Z_95
from rl.reports.figures import embedded_fonts, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class _Series(NamedTuple):
    """One marker for each arm.

    Attributes:
        label: entry of the legend.
        estimates: an estimate for each arm; None where it is not defined.
        offset: vertical distance from the middle of the arm's row.
        colour: of marker and interval.
        marker: matplotlib's name of the marker.
    """

    label: str
    estimates: Sequence[Estimate | None]
    offset: float
    colour: str
    marker: str


def plot_alignment(alignment: Alignment, path: str | Path) -> Path:
    """Draw the multipliers with 95 % intervals, best arm first, and a line at uniform's 1.

    Args:
        alignment: result of :func:`rl.align`.
        path: the picture; its ending chooses PNG, PDF or SVG.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the path cannot be written.
    """
    target = Path(path)
    # The first row is the lowest, so the best arm comes last.
    arms = sorted(alignment.arms, key=lambda arm: arm.multiplier.corrected)
    height = 1.6 + 0.55 * len(arms)
    figure = new_figure(width=8, height=height)
    axes = figure.subplots()
    axes.axvline(1.0, color="#555555", linewidth=1, linestyle="--")

    # Greys of distinct lightness: colours have the meanings of flowgraph's palette. The markers differ as well.
    weighted = [arm.multiplier for arm in arms]
    only_selected = [arm.only_selected for arm in arms]
    only_rest = [arm.only_rest for arm in arms]
    _draw(axes, _Series("weighted as trained", weighted, 0.22, "#1c1d22", "o"))
    _draw(axes, _Series("only the selected tokens", only_selected, 0.0, "#6d7079", "^"))
    _draw(axes, _Series("only the other tokens", only_rest, -0.22, "#a3a6b0", "s"))

    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.set_xlabel("sample multiplier (1 = uniform; 1.1 = as good as 10 % more rollouts), 95 % interval")
    axes.set_title(f"Gradient alignment, {alignment.num_batches} batches", loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="best")

    # Publishers reject the Type 3 fonts that matplotlib embeds by default.
    picture_format = target.suffix.removeprefix(".") or "png"
    with atomic_write(target) as temporary, embedded_fonts():
        figure.savefig(temporary, dpi=160, format=picture_format)
    return target


def _draw(axes: Axes, series: _Series) -> None:
    """Draw one series; a series without any estimate gets no entry in the legend."""
    # Arms without an estimate keep their row, which stays empty.
    rows: list[float] = []
    defined: list[Estimate] = []
    for row, estimate in enumerate(series.estimates):
        if estimate is not None:
            rows.append(row + series.offset)
            defined.append(estimate)
    if not defined:
        return
    axes.errorbar(
        [estimate.corrected for estimate in defined],
        rows,
        xerr=[Z_95 * estimate.error for estimate in defined],
        fmt=series.marker,
        color=series.colour,
        label=series.label,
        markersize=5,
        linewidth=1.4,
        linestyle="none",
        capsize=0,
    )
