"""``flowgraph steps``: the flow of a saved trace between lines, sentences or numbered steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph.commands.common import console

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from flowgraph.steps.step_flow import StepFlow

_BAR = 12
_WIDTH = 72


def steps(
    file: Annotated[Path, typer.Argument(help="A trace written by `flowgraph trace` or FlowTrace.save.")],
    by: Annotated[
        str,
        typer.Option(
            help="auto, lines, sentences, numbered, or a regular expression that matches where a step starts."
        ),
    ] = "auto",
    split_question: Annotated[bool, typer.Option("--split-question", help="Split the question too.")] = False,
    flows: Annotated[int, typer.Option(min=0, help="How many of the strongest flows to list.")] = 12,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write the table of steps here.")] = None,
    flows_csv: Annotated[Path | None, typer.Option("--flows-csv", help="Also write the flows here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write steps and flows here.")] = None,
) -> None:
    """Print how the flow of a saved trace runs from step to step."""
    from flowgraph.files import check_writable
    from flowgraph.tracing.flow_trace import load_trace

    outputs = [path for path in (csv_file, flows_csv, json_file) if path is not None]
    for path in outputs:
        check_writable(path)
    if len(set(outputs)) < len(outputs):
        raise typer.BadParameter("--csv, --flows-csv and --json must each name a file of its own, got one twice")
    result = load_trace(file).steps(by, split_question=split_question)
    screen = console()
    screen.print(f"{result.num_steps} steps by {result.by}", markup=False, highlight=False)
    screen.print(_step_table(result))
    if flows:
        screen.print(_flow_table(result, flows))
    if csv_file is not None:
        result.to_csv(csv_file)
    if flows_csv is not None:
        result.to_csv(flows_csv, flows=True)
    if json_file is not None:
        result.to_json(json_file)


def _step_table(result: StepFlow) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, caption_justify="left")
    for name, justify in (("#", "right"), ("region", "left"), ("tokens", "right"), ("throughput", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("")
    table.add_column("step", overflow="fold")
    throughput = result.throughput.tolist()
    for step in result.steps:
        value = throughput[step.index]
        table.add_row(
            str(step.index),
            step.region or "context",
            f"{step.start}-{step.stop - 1}",
            f"{value:.3f}",
            "█" * round(_BAR * value) or "▏" * (value > 0),
            _line(step.text),
        )
    table.caption = "throughput: share of the flow from question to answer that visits the step"
    return table


def _flow_table(result: StepFlow, count: int) -> Table:
    from rich.table import Table

    rows = result.flow_table(count)
    title = f"strongest {len(rows)} of {result.edge_flow.numel()} flows between steps"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("flow", justify="right")
    table.add_column("from", overflow="fold")
    table.add_column("to", overflow="fold")
    for row in rows:
        ends = [_line(result.steps[row[end]].text, 30, f"{row[end]} ") for end in ("source", "target")]
        table.add_row(f"{row['flow']:.1%}", *ends)
    return table


def _line(text: str, width: int = _WIDTH, before: str = "") -> Text:
    """A step on one line, both ends of a long one; nothing in it can steer the terminal."""
    from rich.text import Text

    from flowgraph.commands.terminal import visible

    line = visible(" ".join(text.split())) if text.strip() else visible(text)
    half = (width - 3) // 2
    return Text(before + (line if len(line) <= width else f"{line[:half]}...{line[-half:]}"))
