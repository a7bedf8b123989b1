"""``flowgraph steps``: the flow of a saved trace between lines, sentences or numbered steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph.commands.common import Full, Quiet, TraceFile, check_outputs, console, one_view

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from flowgraph.steps.step_flow import StepFlow

_BAR_WIDTH = 12
_STEP_WIDTH = 72
_BRIEF_STEP_WIDTH = 34
"""Characters of a step; the brief ones leave each step on one line of 80 columns."""
_END_WIDTH = 30
_NUM_BRIEF_STEPS = 12
"""Steps listed, those with most throughput, unless all are asked for."""
_NUM_BRIEF_FLOWS = 5
_NUM_FLOWS = 12


def steps(
    file: TraceFile,
    by: Annotated[
        str,
        typer.Option(
            help="auto, lines, sentences, numbered, words, or a regular expression that matches where a step starts."
        ),
    ] = "auto",
    split_question: Annotated[bool, typer.Option("--split-question", help="Split the question too.")] = False,
    flows: Annotated[
        int | None, typer.Option(min=0, help="How many of the strongest flows to list. Default: 5, with --full 12.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the table of steps here.")] = None,
    flows_csv: Annotated[Path | None, typer.Option("--flows-csv", help="Also write the flows here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write steps and flows here.")] = None,
    full: Full = False,
    quiet: Quiet = False,
) -> None:
    """Print how the flow of a saved trace runs from step to step."""
    from flowgraph.tracing.flow_trace import load_trace

    one_view(full=full, quiet=quiet)
    check_outputs(csv_file, flows_csv, json_file)
    result = load_trace(file).steps(by, split_question=split_question)
    screen = console()
    screen.print(f"{result.num_steps} steps by {result.by}", markup=False, highlight=False)
    num_flows = flows
    if num_flows is None:
        num_flows = _NUM_FLOWS if full else _NUM_BRIEF_FLOWS
    if not quiet:
        screen.print(_step_table(result, None if full else _NUM_BRIEF_STEPS))
        if num_flows:
            screen.print(_flow_table(result, num_flows))
    if csv_file is not None:
        result.to_csv(csv_file)
    if flows_csv is not None:
        result.to_csv(flows_csv, flows=True)
    if json_file is not None:
        result.to_json(json_file)


def _step_table(result: StepFlow, most: int | None) -> Table:
    """Tabulate the steps in the order of the text: all, or those with most throughput."""
    from rich.table import Table

    from flowgraph.commands.terminal import bar

    table = Table(box=None, pad_edge=False, caption_justify="left")
    table.add_column("#", justify="right")
    table.add_column("region")
    table.add_column("tokens", justify="right")
    table.add_column("throughput", justify="right")
    table.add_column("")
    table.add_column("step", overflow="fold")
    throughput = result.throughput.tolist()
    strongest_first = sorted(range(len(throughput)), key=lambda index: -throughput[index])
    listed = sorted(strongest_first[:most])
    width = _STEP_WIDTH if most is None else _BRIEF_STEP_WIDTH
    for step in (result.steps[index] for index in listed):
        value = throughput[step.index]
        table.add_row(
            str(step.index),
            step.region or "context",
            f"{step.start}-{step.stop - 1}",
            f"{value:.3f}",
            bar(value, _BAR_WIDTH),
            _one_line(step.text, width),
        )
    table.caption = "throughput: share of the flow from question to answer that visits the step"
    if len(listed) < result.num_steps:
        table.caption += f"; {len(listed)} of {result.num_steps} steps, those with most; --full lists all"
    return table


def _flow_table(result: StepFlow, count: int) -> Table:
    """Tabulate the strongest flows between steps."""
    from rich.table import Table

    rows = result.flow_table(count)
    title = f"strongest {len(rows)} of {result.edge_flow.numel()} flows between steps"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("flow", justify="right")
    table.add_column("from", overflow="fold")
    table.add_column("to", overflow="fold")
    for row in rows:
        table.add_row(
            f"{row['flow']:.1%}",
            _end(result, row["source"]),
            _end(result, row["target"]),
        )
    return table


def _end(result: StepFlow, index: int) -> Text:
    """Show a step with its number."""
    return _one_line(result.steps[index].text, _END_WIDTH, prefix=f"{index} ")


def _one_line(text: str, width: int, prefix: str = "") -> Text:
    """Show a step on one line, a long one by both ends, without control characters that could steer the terminal."""
    from rich.text import Text

    from flowgraph.commands.terminal import visible

    if text.strip():
        line = visible(" ".join(text.split()))
    else:
        line = visible(text)
    # Both ends identify a step better than its start alone.
    if len(line) > width:
        half = (width - 3) // 2
        line = f"{line[:half]}...{line[-half:]}"
    return Text(prefix + line)
