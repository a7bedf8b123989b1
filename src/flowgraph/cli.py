"""The command line ``flowgraph``: its commands, and the exit code for invalid input."""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Annotated

import typer

from flowgraph.commands.compare import compare
from flowgraph.commands.cost import cost
from flowgraph.commands.evaluate import evaluate
from flowgraph.commands.export import export
from flowgraph.commands.hubtest import hub_test
from flowgraph.commands.knockout import knockout
from flowgraph.commands.show import certify, show
from flowgraph.commands.steps import steps
from flowgraph.commands.trace import demo, trace
from flowgraph.commands.trace_corpus import CorpusCommand, trace_corpus
from flowgraph.errors import FlowgraphError

app = typer.Typer(
    name="flowgraph",
    help="Trace how a language model's answer drew on its question.",
    epilog="Exit codes: 0 done, 1 a check failed or something broke, 2 bad input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(is_requested: bool) -> None:
    """Print the version and stop, where the option is given."""
    if not is_requested:
        return
    from importlib.metadata import version

    typer.echo(f"flowgraph {version('flowgraph-llm')}")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Read the options of the program itself."""


for command in (trace, demo):
    app.command()(command)
app.command(cls=CorpusCommand)(trace_corpus)
for command in (show, steps, compare, certify, knockout, hub_test, evaluate, export, cost):
    app.command()(command)
# The old name of trace-corpus still works, with a warning, and help does not list it.
app.command("trace-file", cls=CorpusCommand, hidden=True, deprecated=True)(trace_corpus)


def _print_warning(message: Warning | str, *_: object) -> None:
    """Print a warning as a plain line, without the place in the code that it comes from."""
    typer.secho(f"flowgraph: warning: {message}", err=True, fg=typer.colors.YELLOW)


def _replace_unprintable() -> None:
    """Let the output streams replace characters that their encoding lacks, as cp1252 on Windows lacks bars."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def main() -> None:
    """Run the command line; invalid input ends with its message and exit code 2, without a stack trace."""
    _replace_unprintable()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = _print_warning
    try:
        app()
    except FlowgraphError as error:
        typer.secho(f"flowgraph: {error}", err=True, fg=typer.colors.RED)
        sys.exit(2)


if __name__ == "__main__":
    main()
