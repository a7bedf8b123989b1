"""``flowgraph-rl curves``: learning curves of several runs, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph import MissingExtraError
from rl.commands.terminal import console, table

if TYPE_CHECKING:
    from rl.reports.curves import Curve

_WIDTH = 20
"""Columns of a curve."""


def curves_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    window: Annotated[int, typer.Option(help="Steps of the mean that the picture and the blocks show.", min=1)] = 10,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A picture to write: PNG, PDF or SVG.")] = None,
) -> None:
    """Show the rewards of several runs: one line each, on one scale, and a picture."""
    curves = [_read(run) for run in runs]
    print_curves(curves, window)
    if out is not None:
        from rl.reports.curves import plot_curves

        try:
            typer.echo(f"wrote {plot_curves(curves, out, window=window)}")
        except MissingExtraError as error:
            typer.echo(f"no picture: {error}", err=True)


def print_curves(curves: list[Curve], window: int) -> None:
    """Print a line of blocks for each run, all on one scale, with the mean reward of the run and of its ends."""
    from rl.reports.curves import sparkline

    # One scale for all, so that heights can be compared.
    smooth = [curve.smooth(window) for curve in curves]
    low = min(min(values) for values in smooth)
    high = max(max(values) for values in smooth)
    scale = f"reward, {low:.2f} to {high:.2f}"
    rows = table("run", scale, "steps", "first fifth", "last fifth", "whole run", figures=True)
    for curve, values in zip(curves, smooth, strict=True):
        first, last = curve.ends()
        blocks = sparkline(values, low, high, _WIDTH)
        rows.add_row(curve.name, blocks, str(len(curve.steps)), f"{first:.3f}", f"{last:.3f}", f"{curve.area:.3f}")
    console().print(rows)


def _read(run: Path) -> Curve:
    """Read the metrics of a run.

    Raises:
        CheckpointError: the folder holds no finished step.
    """
    from rl.errors import CheckpointError
    from rl.reports.curves import Curve
    from rl.training.tracking import read_metrics

    path = run / "metrics.jsonl"
    rows = read_metrics(path) if path.is_file() else []
    if not rows:
        raise CheckpointError(
            f"runs: must be folders of runs with a finished step, got {run}; train first, or check the name"
        )
    return Curve.of(run.name, rows)
