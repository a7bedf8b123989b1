"""Entry point of ``flowgraph-rl`` and its commands."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from flowgraph import FlowgraphError
from rl.commands.align import align_command
from rl.commands.auc import auc_command
from rl.commands.credit_bench import credit_bench_command
from rl.commands.curves import curves_command
from rl.commands.evaluate import evaluate_command
from rl.commands.models import merge, pretrain_command
from rl.commands.reports import report, rules
from rl.commands.serve import serve
from rl.commands.train import train

app = typer.Typer(
    name="flowgraph-rl",
    help="Train LoRA policies with PPO and token credit shaped by reasoning flow.",
    epilog="Exit codes: 0 done, 1 something broke, 2 bad input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(is_given: bool) -> None:
    """Print the version and stop, where ``--version`` is given."""
    if is_given:
        from importlib.metadata import version

        typer.echo(f"flowgraph-rl {version('flowgraph-llm')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Read the options that stand before a command; the version is printed by its callback."""


app.command()(train)
app.command("eval")(evaluate_command)
app.command()(report)
app.command("pretrain")(pretrain_command)
app.command()(rules)
app.command()(merge)
app.command("align")(align_command)
app.command("auc")(auc_command)
app.command("credit-bench")(credit_bench_command)
app.command("curves")(curves_command)
app.command()(serve)


def main() -> None:
    """Run the command line; bad input ends with its message and exit code 2, without a stack trace."""
    # The libraries below read these when they are imported, which the commands do later.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except FlowgraphError as error:
        typer.secho(f"flowgraph-rl: {error}", err=True, fg=typer.colors.RED)
        sys.exit(2)
    except SystemExit as stop:
        # typer reports an interrupt as exit code 130.
        if stop.code == 130:
            typer.secho("flowgraph-rl: stopped; `train --resume` goes on from the newest checkpoint", err=True)
        raise


# `accelerate launch -m rl.cli` runs this module as a script.
if __name__ == "__main__":
    main()
