"""``flowgraph show | certify``: print or check a saved trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowgraph.commands.common import AllTokens, Full, Keep, Quiet, TraceFile, check_outputs, console, stages
from flowgraph.commands.views import View


def show(
    file: TraceFile,
    keep: Keep = 0.9,
    all_tokens: AllTokens = False,
    html: Annotated[Path | None, typer.Option(help="Also write the web page here.")] = None,
    full: Full = False,
    quiet: Quiet = False,
) -> None:
    """Print a saved trace."""
    from flowgraph.tracing.flow_trace import load_trace

    view = View(full=full, quiet=quiet, all_tokens=all_tokens, keep=keep)

    # A path that cannot be written is reported before any work is done.
    check_outputs(html)
    trace = load_trace(file)
    terminal = console()
    terminal.print(view.of_trace(trace))
    for part in view.of_baselines(trace):
        terminal.print(part)
    if html is not None:
        trace.to_html(html, keep=keep)
    view.print_end(terminal, [])


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
    quiet: Quiet = False,
) -> None:
    """Check everything that is provable about a saved trace; exit code 1 when a check fails."""
    from flowgraph.commands.terminal import brief_certificate, certificate_table
    from flowgraph.files import write_json
    from flowgraph.tracing.flow_trace import load_trace

    check_outputs(json_file)
    with stages(quiet=quiet) as progress:
        progress("checking the flow")
        certificate = load_trace(file).certify(level=level)
    console().print(brief_certificate(certificate) if quiet else certificate_table(certificate))
    if json_file is not None:
        write_json(json_file, certificate.to_dict())
    # Scripts read the result from the exit code.
    if not certificate.ok:
        raise typer.Exit(1)
