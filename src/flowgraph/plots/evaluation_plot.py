"""The figure of one task of an evaluation: methods and controls with their intervals, as a forest plot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowgraph.display.palette import PALETTE
from flowgraph.errors import InvalidInputError
from flowgraph.evaluation.results import Evaluation
from flowgraph.plots.drawing import INK, FigureSize, axes_or_new, counted, drawable, finish_axes, text_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_METHOD = PALETTE["flow"].light
_CONTROL = PALETTE["context"].light
_MAX_NAME = 32
_ROW_HEIGHT = 0.24
"""Inches for each method."""


def plot_evaluation(
    evaluation: Evaluation,
    task: str | None = None,
    *,
    metric: str = "primary",
    split: str | None = None,
    ax: Axes | None = None,
    size: FigureSize | None = None,
) -> Axes:
    """Draw the value of every method on one task with its 95 % interval, best method on top.

    Controls have a grey band and square markers; a line marks the best of them. A method without a value is left out,
    and named in the title.

    Args:
        evaluation: what :func:`flowgraph.evaluate` returned.
        task: which task; None where only one was run.
        metric: which metric; ``"primary"``: the first one of the task.
        split: which split; None where only one was run.
        ax: where; new axes by default.
        size: of a new figure: ``"single"`` or ``"double"`` column of a paper, or width and height in inches.

    Returns:
        The axes.

    Raises:
        InvalidInputError: an argument outside its range, or a choice that has to be made.
        MissingExtraError: matplotlib is not installed.

    Example:
        ``save_figure(plot_evaluation(evaluation, "line_knockout"), "line_knockout.svg")``
    """
    if not isinstance(evaluation, Evaluation):
        raise InvalidInputError(
            f"evaluation: must be an Evaluation, got {type(evaluation).__name__}; flowgraph.evaluate(...) makes one"
        )
    task = _only("task", task, [summary.task for summary in evaluation.summaries])
    split = _only("split", split, [summary.split for summary in evaluation.summaries if summary.task == task])
    rows = evaluation.table(task, metric=metric, split=split)
    shown = [row for row in rows if row["value"] is not None]
    missing = [row["method"] for row in rows if row["value"] is None]
    ax = axes_or_new(ax, (6.8, 1.2 + _ROW_HEIGHT * max(len(shown), 1)), size)

    # The first row of the axis is the lowest, so the best method comes last.
    heights = {row["method"]: len(shown) - 1 - place for place, row in enumerate(shown)}
    # Bands mark the controls, also where colours are lost.
    for row in shown:
        if row["trivial"]:
            height = heights[row["method"]]
            ax.axhspan(height - 0.5, height + 0.5, color=_CONTROL, alpha=0.15, linewidth=0, zorder=0)
    for is_control, colour, marker, label in (
        (False, _METHOD, "o", "method"),
        (True, _CONTROL, "s", "control, reads nothing of the model"),
    ):
        group = [row for row in shown if row["trivial"] is is_control]
        if group:
            ax.plot(
                [row["value"] for row in group],
                [heights[row["method"]] for row in group],
                marker,
                color=colour,
                markersize=4.5,
                label=label,
            )
        for row in group:
            if row["low"] is not None:
                height = heights[row["method"]]
                ax.plot([row["low"], row["high"]], [height, height], color=colour, linewidth=1.3)
    control = next((row for row in shown if row["method"] == row["control"]), None)
    if control is not None:
        ax.axvline(control["value"], color=INK, linewidth=0.8, linestyle="--", label="best control")

    # Names are data: no mathematics, and no missing glyphs.
    names = [drawable(row["method"], _MAX_NAME) for row in reversed(shown)]
    ax.set_yticks(range(len(shown)), names, fontsize=text_size(ax), parse_math=False)
    ax.set_ylim(-0.6, max(len(shown), 1) - 0.4)
    chosen = rows[0]["metric"] if rows else metric
    ax.set_xlabel(f"{drawable(chosen, 60)}, 95 % interval", parse_math=False)
    num_items = max((row["n"] for row in shown), default=0)
    title = f"{drawable(task, 60)} ({split}), {counted(num_items, 'item')}"
    if missing:
        title += f"; without a value: {', '.join(drawable(name, _MAX_NAME) for name in missing)}"
    finish_axes(ax, title)
    return ax


def _only(argument: str, given: str | None, known: list[str]) -> str:
    """Return the choice, or the only one that there is.

    Raises:
        InvalidInputError: it is not known, or none is given and there are several.
    """
    names = list(dict.fromkeys(known))
    if given is None and len(names) == 1:
        return names[0]
    if given not in names:
        raise InvalidInputError(
            f"{argument}: must be of {', '.join(names) or 'none'}, got {given!r}; name one that was run"
        )
    return given
