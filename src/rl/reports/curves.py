"""Learning curves of several runs, as figures, as a line of text and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgraph import atomic_write
from rl.reports.figures import embedded_fonts, new_figure

_BLOCKS = "▁▂▃▄▅▆▇█"
_COLOURS = ("#6d7079", "#1c1d22", "#a3a6b0", "#44464d")
_STYLES = ("--", "-", ":", "-.")


@dataclass(frozen=True)
class Curve:
    """The rewards of one run.

    Attributes:
        name: of the run.
        steps: number of each step.
        rewards: mean reward of each step.
    """

    name: str
    steps: tuple[int, ...]
    rewards: tuple[float, ...]

    @classmethod
    def of(cls, name: str, rows: Sequence[Mapping[str, Any]]) -> Curve:
        """Read the rows of a metrics file."""
        return cls(name, tuple(row["step"] for row in rows), tuple(float(row["reward"]) for row in rows))

    @property
    def area(self) -> float:
        """Return the mean reward over the run."""
        return statistics.fmean(self.rewards)

    def ends(self, part: float = 0.2) -> tuple[float, float]:
        """Return the mean reward of the first and of the last part of the run."""
        size = max(1, round(part * len(self.rewards)))
        first = statistics.fmean(self.rewards[:size])
        last = statistics.fmean(self.rewards[-size:])
        return first, last

    def smooth(self, window: int) -> list[float]:
        """Return the mean of each step and the steps before it, up to ``window`` in all.

        Example:
            >>> Curve("run", (1, 2, 3), (0.0, 1.0, 2.0)).smooth(2)
            [0.0, 0.5, 1.5]
        """
        smoothed = []
        for place in range(len(self.rewards)):
            stop = place + 1
            start = max(0, stop - window)
            smoothed.append(statistics.fmean(self.rewards[start:stop]))
        return smoothed


def sparkline(values: Sequence[float], low: float, high: float, width: int) -> str:
    """Draw values as blocks of eight heights; neighbours are averaged where there are more values than columns.

    Args:
        values: at least one.
        low: value of the lowest block.
        high: value of the highest block.
        width: most columns.

    Example:
        >>> sparkline([0.0, 0.5, 1.0], 0.0, 1.0, width=10)
        '▁▅█'
    """
    # Neighbouring values share a column where there are too many.
    num_values = len(values)
    num_columns = min(width, num_values)
    highest_block = len(_BLOCKS) - 1
    text = ""
    for column in range(num_columns):
        start = column * num_values // num_columns
        stop = (column + 1) * num_values // num_columns
        mean = statistics.fmean(values[start:stop])
        # Values outside the range get the lowest or the highest block.
        share = 0.0 if high <= low else (mean - low) / (high - low)
        block = int(share * len(_BLOCKS))
        text += _BLOCKS[min(highest_block, max(0, block))]
    return text


def plot_curves(curves: Sequence[Curve], path: str | Path, *, window: int) -> Path:
    """Draw the curves, smoothed, with the rewards of the steps behind them.

    Args:
        curves: of the runs, in the order of the legend.
        path: the picture; its ending chooses PNG, PDF or SVG.
        window: steps of a mean.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the path cannot be written.
    """
    target = Path(path)
    figure = new_figure(width=8, height=4)
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        colour = _COLOURS[number % len(_COLOURS)]
        style = _STYLES[number % len(_STYLES)]
        # The steps themselves are pale: one step is a few responses.
        axes.plot(curve.steps, curve.rewards, ".", color=colour, alpha=0.25, markersize=3)
        label = f"{curve.name}: {curve.area:.3f} over the run"
        axes.plot(curve.steps, curve.smooth(window), style, color=colour, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(f"reward on new problems, mean of {window} steps")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)

    picture_format = target.suffix.removeprefix(".") or "png"
    with atomic_write(target) as temporary, embedded_fonts():
        figure.savefig(temporary, dpi=160, format=picture_format)
    return target
