"""``flowgraph evaluate --planted``: check methods on small models whose truth is known by construction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from flowgraph.commands.common import console, stages, warnings_on_stderr
from flowgraph.display.signs import visible

if TYPE_CHECKING:
    from rich.table import Table

    from flowgraph.evaluation.planted import PlantedScore

PLANTED_FILE = "planted.json"
SCHEMA = "flowgraph-planted/1"
DEFAULT_METHODS = ("preset:standard",)
DEFAULT_TEXTS = 8
_SHOWN = "recovered"
"""The figure of the main table; all others are printed with ``--full``."""


def evaluate_planted(
    methods: Sequence[str], *, number: int, seed: int, out: Path | None, full: bool, quiet: bool
) -> None:
    """Run methods on every kind of planted text, print the table, and write ``planted.json``.

    Args:
        methods: names and presets.
        number: texts of each kind.
        seed: of the texts.
        out: folder of ``planted.json``; None: nothing is written.
        full: also print every figure, as a Markdown table.
        quiet: print a line for each method alone.

    Raises:
        InvalidInputError: an unknown method, or fewer than one text.
        OutputError: the folder cannot be written.
        Exit: with code 1 where no method ran.
    """
    from flowgraph.corpus.run_folder import claimed
    from flowgraph.evaluation.catalogue import expand_methods, find_method
    from flowgraph.evaluation.planted import PLANTED_KINDS, planted_check, planted_table
    from flowgraph.files import write_json

    # A wrong name or folder is reported before anything runs.
    chosen = [find_method(name) for name in expand_methods(methods)]
    if out is not None:
        with claimed(out):
            pass

    # One kind at a time, so that the progress names it.
    scores: list[PlantedScore] = []
    with stages(quiet=quiet) as progress, warnings_on_stderr():
        for kind in PLANTED_KINDS:
            progress(f"planted {kind}: {len(chosen)} methods on {number} texts")
            scores += planted_check(chosen, kinds=[kind], number=number, seed=seed)

    # A screen holds one figure of every method and kind; --full adds the others.
    terminal = console()
    if quiet:
        for name, cells in _cells(scores).items():
            listed = ", ".join(f"{kind} {cell}" for kind, cell in cells.items())
            terminal.print(visible(f"{name}: {listed}"), soft_wrap=True, markup=False, highlight=False)
    else:
        terminal.print(f"planted models, {number} texts of each kind: {_SHOWN}", style="bold", highlight=False)
        terminal.print(_table(scores))
        legend = (
            "share of the tokens that decide the answer, known by construction, which score above all others; 1.00 is "
            "best. * control, reads nothing of the model"
        )
        terminal.print(legend, style="dim italic", width=100, highlight=False)
        for line in _refusals(scores):
            terminal.print(visible(line), style="yellow", soft_wrap=True, markup=False, highlight=False)
    if full:
        terminal.print()
        # Line by line: a line break inside a text would be shown as a sign.
        for line in planted_table(scores).splitlines():
            terminal.print(visible(line), soft_wrap=True, markup=False, highlight=False)
    if out is not None:
        payload = {
            "schema": SCHEMA,
            "settings": {"number": number, "seed": seed},
            "rows": [score.to_dict() for score in scores],
        }
        write_json(out / PLANTED_FILE, payload)
        if not quiet:
            terminal.print(f"table: {out / PLANTED_FILE}", style="dim", soft_wrap=True, highlight=False)
    # A script has to notice that nothing was measured.
    if all(score.error is not None for score in scores):
        raise typer.Exit(1)


def _cells(scores: Sequence[PlantedScore]) -> dict[str, dict[str, str]]:
    """Write the main figure of each method and kind; a dash where there is none."""
    from flowgraph.pages.evaluation_page import figure

    cells: dict[str, dict[str, str]] = {}
    for score in scores:
        value = score.to_dict()["figures"][_SHOWN]
        cells.setdefault(score.method, {})[score.kind] = figure(value)
    return cells


def _table(scores: Sequence[PlantedScore]) -> Table:
    """Tabulate the main figure: a row for each method, a column for each kind."""
    from rich.table import Table
    from rich.text import Text

    from flowgraph.evaluation.catalogue import find_method

    cells = _cells(scores)
    kinds = list(dict.fromkeys(score.kind for score in scores))
    table = Table(box=None, pad_edge=False)
    table.add_column("method", overflow="fold")
    for kind in kinds:
        table.add_column(kind, justify="right", no_wrap=True)
    for name, own in cells.items():
        is_control = find_method(name).trivial
        label = Text(visible(f"{name}{'*' if is_control else ''}"))
        table.add_row(label, *(own[kind] for kind in kinds), style="dim" if is_control else "")
    return table


def _refusals(scores: Sequence[PlantedScore]) -> list[str]:
    """Say which methods ran on no text of a kind, and why: a line for each method and reason."""
    # A method mostly refuses all kinds for the same reason.
    kinds_of: dict[tuple[str, str], list[str]] = {}
    for score in scores:
        if score.error is not None:
            kinds_of.setdefault((score.method, score.error), []).append(score.kind)
    return [f"- {method} has no value for {', '.join(kinds)}: {error}" for (method, error), kinds in kinds_of.items()]
