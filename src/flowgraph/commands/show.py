"""``flowgraph show | certify``: print or check a saved trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowgraph.commands.common import AllTokens, Keep, TraceFile, check_outputs, console, stages


def show(
    file: TraceFile,
    keep: Keep = 0.9,
    all_tokens: AllTokens = False,
    html: Annotated[Path | None, typer.Option(help="Also write the web page here.")] = None,
) -> None:
    """Print a saved trace."""
    from flowgraph.commands.terminal import NUM_TOKEN_ROWS, render_trace
    from flowgraph.tracing.flow_trace import load_trace

    # A path that cannot be written is reported before any work is done.
    check_outputs(html)
    trace = load_trace(file)
    rows = None if all_tokens else NUM_TOKEN_ROWS
    console().print(render_trace(trace, keep=keep, rows=rows))
    if html is not None:
        trace.to_html(html, keep=keep)


def certify(
    file: TraceFile,
    level: Annotated[
        str,
        typer.Option(
            help="fast: without the max flow; exact: with it; rational: recomputed in fractions too; auto: exact "
            "where the graph is small enough."
        ),
    ] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the certificate here.")] = None,
) -> None:
    """Check everything that is provable about a saved trace; exit code 1 when a check fails."""
    from flowgraph.commands.terminal import certificate_table
    from flowgraph.files import write_json
    from flowgraph.tracing.flow_trace import load_trace

    check_outputs(json_file)
    with stages() as progress:
        progress("checking the flow")
        certificate = load_trace(file).certify(level=level)
    console().print(certificate_table(certificate))
    if json_file is not None:
        write_json(json_file, certificate.to_dict())
    # Scripts read the result from the exit code.
    if not certificate.ok:
        raise typer.Exit(1)
