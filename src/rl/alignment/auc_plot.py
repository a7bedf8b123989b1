"""Plot the AUC of every rule, against detours and against all other tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowgraph import atomic_write
from rl.alignment.credit_auc import CreditAuc, RuleAuc
from rl.reports.figures import embedded_fonts, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_ROWS = 40
"""Rows of a picture: of a sweep, the highest."""


def plot_auc(found: CreditAuc, path: str | Path) -> Path:
    """Draw both AUCs with 95 % intervals, the best rule first, and a line at .5.

    Args:
        found: result of :func:`rl.credit_auc`.
        path: the picture; its ending chooses PNG, PDF or SVG.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the path cannot be written.
    """
    target = Path(path)
    # The first row is the lowest, so the best rule comes last; rules without a value come below all others.
    ranked = sorted(found.rules, key=lambda row: -1.0 if row.auc is None else row.auc)
    rows = ranked[-_MOST_ROWS:]
    height = 1.6 + 0.4 * len(rows)
    figure = new_figure(width=8, height=height)
    axes = figure.subplots()
    axes.axvline(0.5, color="#555555", linewidth=1, linestyle="--")
    _draw(axes, rows, against_detours=True)
    _draw(axes, rows, against_detours=False)

    # A little room, so that markers at 0 and 1 are whole.
    axes.set_xlim(-0.02, 1.02)
    axes.set_yticks(range(len(rows)), [row.rule for row in rows])
    axes.set_xlabel("AUC of decisive tokens (.5 = cannot tell them apart), 95 % interval over problems")
    axes.set_title(f"{found.num_responses} responses to {found.num_problems} problems", loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="best")

    picture_format = target.suffix.removeprefix(".") or "png"
    with atomic_write(target) as temporary, embedded_fonts():
        figure.savefig(temporary, dpi=160, format=picture_format)
    return target


def _draw(axes: Axes, rows: Sequence[RuleAuc], *, against_detours: bool) -> None:
    """Draw one series; rules without a value have no marker."""
    # The two series of a rule lie above and below the middle of its row.
    offset = 0.12 if against_detours else -0.12
    places = []
    values = []
    below = []
    above = []
    for place, row in enumerate(rows):
        value = row.auc if against_detours else row.auc_others
        low = row.low if against_detours else row.low_others
        high = row.high if against_detours else row.high_others
        if value is None:
            continue
        places.append(place + offset)
        values.append(value)
        # Without an interval the marker has no line. Matplotlib rejects negative lengths, which rounding can give.
        below.append(0.0 if low is None else max(0.0, value - low))
        above.append(0.0 if high is None else max(0.0, high - value))
    if not values:
        return
    axes.errorbar(
        values,
        places,
        xerr=[below, above],
        fmt="o" if against_detours else "s",
        color="#1c1d22" if against_detours else "#a3a6b0",
        label="against detours" if against_detours else "against all other tokens",
        markersize=5,
        linewidth=1.4,
        linestyle="none",
    )
