"""``flowgraph show | certify``: look at a saved trace again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowgraph.commands.common import AllTokens, Keep, console, stages


def show(
    file: Annotated[Path, typer.Argument(help="A trace written by `flowgraph trace` or FlowTrace.save.")],
    keep: Keep = 0.9,
    all_tokens: AllTokens = False,
    html: Annotated[Path | None, typer.Option(help="Also write the web page here.")] = None,
) -> None:
    """Print a saved trace."""
    from flowgraph.commands.terminal import render_trace
    from flowgraph.files import check_writable
    from flowgraph.tracing.flow_trace import load_trace

    if html is not None:
        check_writable(html)
    result = load_trace(file)
    console().print(render_trace(result, keep=keep, rows=None if all_tokens else 24))
    if html is not None:
        result.to_html(html, keep=keep)


def certify(
    file: Annotated[Path, typer.Argument(help="A saved trace.")],
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
    from flowgraph.files import check_writable, write_json
    from flowgraph.tracing.flow_trace import load_trace

    if json_file is not None:
        check_writable(json_file)
    with stages() as progress:
        progress("checking the flow")
        certificate = load_trace(file).certify(level=level)
    console().print(certificate_table(certificate))
    if json_file is not None:
        write_json(json_file, certificate.to_dict())
    raise typer.Exit(0 if certificate.ok else 1)
