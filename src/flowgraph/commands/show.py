"""``flowgraph show | certify``: print or check a saved trace."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph.commands.common import AllTokens, Full, Keep, Quiet, TraceFile, check_outputs, console, stages
from flowgraph.commands.views import View

if TYPE_CHECKING:
    from flowgraph.tracing.flow_trace import FlowTrace

FIGURES = ("throughput", "steps", "potentials")
"""What ``--figure`` can draw."""


def show(
    file: TraceFile,
    keep: Keep = 0.9,
    all_tokens: AllTokens = False,
    html: Annotated[Path | None, typer.Option(help="Also write the web page here.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Also draw a figure here, as .pdf, .svg or .png; needs matplotlib.")
    ] = None,
    of: Annotated[str, typer.Option(help="What the figure shows: 'throughput', 'steps' or 'potentials'.")] = FIGURES[0],
    size: Annotated[str, typer.Option(help="Of the figure: 'single' or 'double' column of a paper.")] = "double",
    full: Full = False,
    quiet: Quiet = False,
) -> None:
    """Print a saved trace."""
    from flowgraph.tracing.flow_trace import load_trace

    view = View(full=full, quiet=quiet, all_tokens=all_tokens, keep=keep)

    # A path that cannot be written is reported before any work is done.
    check_outputs(html, figure)
    if of not in FIGURES:
        raise typer.BadParameter(f"--of must be of {', '.join(FIGURES)}, got {of!r}; 'throughput' is the default")
    trace = load_trace(file)
    # Drawn before anything is printed: a missing package or a wrong ending leaves no half of an answer.
    if figure is not None:
        _draw(trace, figure, of, size)
    terminal = console()
    terminal.print(view.of_trace(trace))
    for part in view.of_baselines(trace):
        terminal.print(part)
    if html is not None:
        trace.to_html(html, keep=keep)
    view.print_end(terminal, [])


def _draw(trace: FlowTrace, path: Path, of: str, size: str) -> None:
    """Draw a figure of a trace without opening a window.

    Raises:
        InvalidInputError: a size or an ending of the file that is none.
        MissingExtraError: matplotlib is not installed.
    """
    from flowgraph.errors import MissingExtraError

    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(
            '--figure: needs matplotlib, got an environment without it; pip install "flowgraph-llm[plot]"'
        )
    import matplotlib as mpl

    from flowgraph.plots import trace_plots
    from flowgraph.plots.drawing import save_figure

    # No window, whatever the user's settings are.
    mpl.use("Agg")
    from matplotlib import pyplot

    if of == "steps":
        ax = trace_plots.plot_steps(trace, size=size)  # type: ignore[arg-type]
    elif of == "potentials":
        ax = trace_plots.plot_potentials(trace, size=size)  # type: ignore[arg-type]
    else:
        ax = trace_plots.plot_throughput(trace, size=size)  # type: ignore[arg-type]
    save_figure(ax, path)
    pyplot.close(ax.figure)  # type: ignore[arg-type]


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
