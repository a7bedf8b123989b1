"""``flowgraph hub-test``: measure whether the answer depends more on the tokens with most flow than on others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph.commands.common import (
    Device,
    Dtype,
    Layers,
    Model,
    Quiet,
    check_outputs,
    console,
    layer_choice,
    load_model,
    stages,
    warnings_on_stderr,
)

if TYPE_CHECKING:
    from rich.table import Table

    from flowgraph.analysis.statistics import Interval
    from flowgraph.interventions.hubtest import HubTest

# The headings and widths fit 80 columns.
_HEADINGS = ("masked", "arm", "change of log p, 95 %", "flips, 95 %", "over")
_LEFT_ALIGNED = ("arm", "over")


def hub_test(
    files: Annotated[list[Path], typer.Argument(help="Traces written by `flowgraph trace` or FlowTrace.save.")],
    model: Model = "demo",
    fractions: Annotated[str, typer.Option(help="Shares of the tokens to mask.")] = "0.05,0.1,0.2",
    arms: Annotated[str, typer.Option(help="Some of top,random,matched,bottom.")] = "top,random,matched,bottom",
    seeds: Annotated[int, typer.Option(help="Number of random draws.", min=1)] = 10,
    region: Annotated[str, typer.Option(help="'reasoning' or 'question'.")] = "reasoning",
    score: Annotated[
        str, typer.Option(help="What ranks the tokens: 'throughput', 'potential', 'attention' or 'recency'.")
    ] = "throughput",
    layers: Layers = "all",
    batch_size: Annotated[int, typer.Option(help="Interventions in one forward pass.", min=1)] = 8,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every measurement here.")] = None,
    quiet: Quiet = False,
) -> None:
    """Mask the top, random and bottom tokens by throughput, and compare what that does to the answer."""
    from flowgraph.files import write_json
    from flowgraph.tracing.flow_trace import load_trace

    shares = _shares(fractions)
    check_outputs(json_file)
    traces = [load_trace(file) for file in files]
    with stages(quiet=quiet) as progress:
        network, _ = load_model(model, dtype, device, progress)
        import flowgraph

        # Warnings, such as about another model than the traced one, concern the reader.
        with warnings_on_stderr():
            result = flowgraph.hub_test(
                network,
                traces,
                fractions=shares,
                arms=[arm.strip() for arm in arms.split(",")],
                seeds=range(seeds),
                region=region,
                scores=score,
                layers=layer_choice(layers),
                batch_size=batch_size,
                progress=progress,
            )
    if json_file is not None:
        write_json(json_file, {**result.to_dict(), "files": [str(file) for file in files], "model": model})
    _print(result, quiet)


def _shares(text: str) -> list[float]:
    """Read the shares of tokens to mask."""
    try:
        return [float(share) for share in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--fractions must be numbers like 0.05,0.1,0.2, got {text!r}; separate them by commas"
        ) from None


def _print(result: HubTest, quiet: bool) -> None:
    """Print the table of a hub test with a heading; where quiet, the first of its differences in one line."""
    if quiet:
        row = [*result.differences, *result.rows][0]
        console().print(f"{row.arm} at {row.fraction:.3g}: {row.change:+.2f}{_interval(row.change_interval, '+.2f')}")
        return
    counts = f"{len(result.runs)} runs on {result.num_traces} trace(s)"
    terminal = console()
    terminal.print(f"{counts}: {result.region} tokens masked by {result.score}", highlight=False)
    terminal.print(_table(result))
    # With one trace, only the random arms vary.
    if result.num_traces == 1:
        terminal.print(
            "one trace: the intervals show how much the random draw matters, and nothing about other texts",
            highlight=False,
        )


def _table(result: HubTest) -> Table:
    """Tabulate the arms and their differences, with a section for each share of masked tokens."""
    from rich.table import Table

    table = Table(show_edge=False)
    for heading in _HEADINGS:
        justify = "left" if heading in _LEFT_ALIGNED else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    previous = None
    for row in sorted((*result.rows, *result.differences), key=lambda row: row.fraction):
        # A rule between the shares of masked tokens.
        if previous is not None and row.fraction != previous:
            table.add_section()
        previous = row.fraction
        what = row.units if row.count > 1 else row.units.removesuffix("s")
        table.add_row(
            f"{row.fraction:.3g}",
            row.arm,
            f"{row.change:+.2f}{_interval(row.change_interval, '+.2f')}",
            f"{row.flip_rate:.0%}{_interval(row.flip_interval, '.0%')}",
            f"{row.count} {what}",
        )
    return table


def _interval(interval: Interval, style: str) -> str:
    """Format an interval; empty where there is none."""
    if interval is None:
        return ""
    low, high = interval
    return f" [{low:{style}}, {high:{style}}]"
