"""``flowgraph hub-test``: does the answer depend more on the tokens with most flow than on others?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph.commands.common import Device, Dtype, Model, console, load_model, stages, warnings_on_stderr

if TYPE_CHECKING:
    from flowgraph.analysis.statistics import Interval
    from flowgraph.interventions.hubtest import HubTest


def hub_test(
    files: Annotated[list[Path], typer.Argument(help="Traces written by `flowgraph trace` or FlowTrace.save.")],
    model: Model = "demo",
    fractions: Annotated[str, typer.Option(help="Shares of the tokens to mask.")] = "0.05,0.1,0.2",
    arms: Annotated[str, typer.Option(help="Some of top,random,matched,bottom.")] = "top,random,matched,bottom",
    seeds: Annotated[int, typer.Option(help="Number of random draws.", min=1)] = 10,
    region: Annotated[str, typer.Option(help="'reasoning' or 'question'.")] = "reasoning",
    score: Annotated[
        str, typer.Option(help="What ranks the tokens: 'throughput', 'potential', 'attention' or 'position'.")
    ] = "throughput",
    layers: Annotated[str, typer.Option(help="'all', 'middle', 'FIRST-LAST'.")] = "all",
    batch_size: Annotated[int, typer.Option(help="Interventions in one forward pass.", min=1)] = 8,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every measurement here.")] = None,
) -> None:
    """Mask the top, random and bottom tokens by throughput, and compare what that does to the answer."""
    from flowgraph.files import check_writable, write_json
    from flowgraph.tracing.flow_trace import load_trace

    try:
        shares = [float(share) for share in fractions.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--fractions must be numbers like 0.05,0.1,0.2, got {fractions!r}") from None
    if json_file is not None:
        check_writable(json_file)
    traces = [load_trace(file) for file in files]
    with stages() as progress:
        network, _ = load_model(model, dtype, device, progress)
        import flowgraph.interventions.hubtest as hubtest

        with warnings_on_stderr():
            result = hubtest.hub_test(
                network, traces, fractions=shares, arms=[arm.strip() for arm in arms.split(",")], seeds=range(seeds),
                region=region, scores=score, layers=layers, batch_size=batch_size, progress=progress,
            )  # fmt: skip
    if json_file is not None:
        write_json(json_file, {**result.to_dict(), "files": [str(file) for file in files], "model": model})
    _report(result)


def _report(result: HubTest) -> None:
    from rich.table import Table

    table = Table(show_edge=False)
    for heading in ("masked", "arm", "change of log p, 95 %", "flips, 95 %", "over"):  # fits 80 columns
        table.add_column(heading, justify="left" if heading in ("arm", "over") else "right", no_wrap=True)
    previous = None
    for row in sorted((*result.rows, *result.differences), key=lambda row: row.fraction):
        if previous not in (None, row.fraction):
            table.add_section()
        previous = row.fraction
        units = row.units if row.count > 1 else row.units.removesuffix("s")
        table.add_row(
            f"{row.fraction:.3g}", row.arm, f"{row.change:+.2f}{_interval(row.change_interval, '+.2f')}",
            f"{row.flip_rate:.0%}{_interval(row.flip_interval, '.0%')}", f"{row.count} {units}",
        )  # fmt: skip
    terminal = console()
    terminal.print(
        f"{len(result.runs)} runs on {result.num_traces} trace(s): {result.region} tokens masked by {result.score}",
        highlight=False,
    )
    terminal.print(table)
    if result.num_traces == 1:
        terminal.print(
            "one trace: the intervals say how much the random draw matters, and nothing about other texts",
            highlight=False,
        )


def _interval(interval: Interval, style: str) -> str:
    return "" if interval is None else f" [{interval[0]:{style}}, {interval[1]:{style}}]"
