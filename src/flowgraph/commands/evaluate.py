"""``flowgraph evaluate``: compare explanation methods on tasks whose truth is known or measured."""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowgraph.commands.common import (
    Device,
    Dtype,
    Model,
    Quiet,
    console,
    load_model,
    one_view,
    stages,
    warnings_on_stderr,
)
from flowgraph.commands.progress import clock, reporting
from flowgraph.display.signs import without_roles

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from flowgraph.evaluation.results import Evaluation
    from flowgraph.evaluation.run import EvaluationProgress
    from flowgraph.evaluation.tables import TaskSummary

_WIDTH = 100
"""Columns that the tables need at most."""
_MAX_NAME = 26
"""Characters of a method's name in a table."""
_MODULE = "flowgraph_imported"


def evaluate(
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", "-t", help="Names, separated by commas; --list prints them.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", "-M", help="Names and presets like preset:trivial, separated by commas."),
    ] = None,
    model: Model = "demo",
    items: Annotated[
        int | None,
        typer.Option(
            "--items", "-n", help="Items of each task and split, 60 by default; with --planted texts of each kind, 8."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="'dev' for choosing, 'test' to be read once for what was chosen, or 'both'.")
    ] = "test",
    seed: Annotated[int, typer.Option(help="Of items, random methods, intervals and p-values.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for records, tables and page; run again to continue.")
    ] = None,
    planted: Annotated[
        bool,
        typer.Option(
            "--planted",
            help="Instead of tasks, check the methods (preset:standard by default) on small models whose truth is "
            "known by construction; writes planted.json. Needs no model.",
        ),
    ] = False,
    figures: Annotated[
        bool, typer.Option("--figures", help="Also draw a figure of each task into the folder.")
    ] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", help="A Python file or module that registers tasks or methods; it is run."),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Print tasks, methods and presets, and stop.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Print all metrics, not only the first of each task.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Compare explanation methods with controls, on tasks whose truth is known or measured.

    Example: flowgraph evaluate --tasks line_knockout --methods preset:standard --split dev --out results
    Without a model: flowgraph evaluate --planted --methods relevance,vtrace_share
    """
    import flowgraph
    from flowgraph.commands.evaluate_planted import DEFAULT_METHODS, DEFAULT_TEXTS, evaluate_planted
    from flowgraph.corpus.run_folder import claimed
    from flowgraph.evaluation.run import DEFAULT_ITEMS, check_request

    one_view(full=full, quiet=quiet)
    for name in imports or ():
        _import(name)
    if show_list:
        _print_list(console())
        return

    if planted:
        # Each of these would be ignored.
        given = {"--tasks": bool(tasks), "--split": split != "test", "--figures": figures}
        for option in (option for option, is_given in given.items() if is_given):
            raise typer.BadParameter(f"--planted has texts of its own and no figure, got {option}; leave one out")
        evaluate_planted(
            _separated("methods", methods) if methods else DEFAULT_METHODS,
            number=DEFAULT_TEXTS if items is None else items,
            seed=seed,
            out=out,
            full=full,
            quiet=quiet,
        )
        return

    # A wrong name or folder is reported before the model is loaded.
    items = DEFAULT_ITEMS if items is None else items
    task_names = _separated("tasks", tasks)
    method_names = _separated("methods", methods)
    check_request(task_names, method_names, items, split, seed)
    if figures:
        _check_figures(out)
    if out is not None:
        with claimed(out):
            pass
    with stages(quiet=quiet) as progress:
        network, tokenizer = load_model(model, dtype, device, progress)

    try:
        with warnings_on_stderr(), reporting(_figures, quiet=quiet) as report:
            evaluation = flowgraph.evaluate(
                network,
                tokenizer,
                tasks=task_names,
                methods=method_names,
                items=items,
                split=split,  # type: ignore[arg-type]
                seed=seed,
                out=out,
                progress=report,
            )
    except KeyboardInterrupt:
        kept = "nothing was kept: name a folder by --out"
        if out is not None:
            kept = f"everything finished is in {out}: run the same command to continue"
        typer.secho(f"flowgraph: stopped; {kept}", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    if figures and out is not None:
        _draw(evaluation, out)
    _print(evaluation, console(), full=full, quiet=quiet)
    if evaluation.unexpected or not any(summary.num_usable for summary in evaluation.summaries):
        raise typer.Exit(1)


def _separated(option: str, given: Sequence[str] | None) -> list[str]:
    """Read names that are separated by commas, from an option that may be repeated.

    Raises:
        BadParameter: no name.
    """
    names = [name.strip() for text in given or () for name in text.split(",")]
    names = [name for name in names if name]
    if not names:
        raise typer.BadParameter(
            f"--{option} must name at least one of them, got none; `flowgraph evaluate --list` prints them"
        )
    return names


def _import(name: str) -> None:
    """Run a Python file, or import a module, that registers tasks or methods.

    Raises:
        BadParameter: there is no such file or module, or it is not Python.
    """
    problem = f"--import must be a Python file or module, got {name!r}"
    if not name.endswith(".py"):
        # A module of the current folder, as `python -m` finds it.
        sys.path.insert(0, "")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise typer.BadParameter(f"{problem} ({error}); check the name") from error
        finally:
            sys.path.remove("")
        return
    path = Path(name)
    if not path.is_file():
        raise typer.BadParameter(f"{problem}, which is no file; check the path")
    module_name = f"{_MODULE}_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise typer.BadParameter(f"{problem}, which cannot be loaded; check the path")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look for the module of their class by name.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise typer.BadParameter(f"{problem} ({error}); correct the file") from error


def _check_figures(out: Path | None) -> None:
    """Refuse figures without a folder, or without matplotlib, before anything runs."""
    from flowgraph.errors import MissingExtraError

    if out is None:
        raise typer.BadParameter("--figures needs a folder, got no --out; name one")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError(
            '--figures: needs matplotlib, got an environment without it; pip install "flowgraph-llm[plot]"'
        )


def _draw(evaluation: Evaluation, out: Path) -> None:
    """Draw a figure of each task and split into the folder ``figures``."""
    import matplotlib as mpl

    from flowgraph.evaluation.evaluation_folder import safe_name
    from flowgraph.plots.drawing import save_figure
    from flowgraph.plots.evaluation_plot import plot_evaluation

    # No window, whatever the user's settings are.
    mpl.use("Agg")
    from matplotlib import pyplot

    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    for summary in evaluation.summaries:
        ax = plot_evaluation(evaluation, summary.task, split=summary.split)
        save_figure(ax, folder / f"{safe_name(summary.task)}-{summary.split}.png")
        pyplot.close(ax.figure)  # type: ignore[arg-type]


def _figures(state: EvaluationProgress) -> str:
    """Format counts, rate and time left: ``12/40 items, 0.52 items/s, 0:54 left``."""
    parts = [f"{state.done}/{state.total} items"]
    if state.seconds_left is not None:
        rate = state.items_per_second
        parts.append(f"{rate:.2f} items/s" if rate >= 1 else f"{1 / rate:.1f} s an item")
        parts.append(f"{clock(state.seconds_left)} left")
    return ", ".join(parts)


def _print_list(terminal: Console) -> None:
    """Print every task, method and preset with its one-line summary."""
    from flowgraph.evaluation.catalogue import (
        evaluation_methods,
        evaluation_tasks,
        find_method,
        find_task,
    )
    from flowgraph.evaluation.methods.names import method_presets

    # Everything that is registered, also by --import.
    tasks = []
    for name in evaluation_tasks():
        task = find_task(name)
        tasks.append((name, f"{without_roles(task.summary)} Reads {task.reads}."))
    methods = []
    for name in evaluation_methods():
        method = find_method(name)
        kind = "control" if method.trivial else f"gives {' and '.join(method.gives)}"
        methods.append((name, f"{without_roles(method.summary)} ({kind})"))
    presets = [(f"preset:{name}", ", ".join(members)) for name, members in method_presets().items()]
    for title, entries in (("tasks", tasks), ("methods", methods), ("presets", presets)):
        terminal.print(title, style="bold")
        table = _plain_table()
        table.add_column("", no_wrap=True)
        table.add_column("", overflow="fold")
        for name, text in entries:
            table.add_row(_text(f"  {name}"), _text(text))
        if not entries:
            table.add_row(_text("  none"), _text("register your own, or install a package that has some"))
        terminal.print(table)


def _plain_table() -> Table:
    """Return a table without lines and heads."""
    from rich.table import Table

    return Table(box=None, pad_edge=False, show_header=False)


def _text(text: str, style: str = "") -> Any:
    """Return a text that is not read as markup, without invisible characters."""
    from rich.text import Text

    from flowgraph.commands.terminal import visible

    return Text(visible(text), style=style)


def _print(evaluation: Evaluation, terminal: Console, *, full: bool, quiet: bool) -> None:
    """Print the tables of all tasks; one line each where quiet."""
    for summary in evaluation.summaries:
        rows = evaluation.table(summary.task, split=summary.split)
        primary = [row for row in rows if row["primary"]]
        if quiet:
            terminal.print(_one_line(summary, primary), soft_wrap=True)
            continue
        terminal.print(_text(f"{summary.task} ({summary.split})", "bold"), soft_wrap=True)
        terminal.print(_text(summary.summary, "dim"), width=_WIDTH)
        for note in summary.notes:
            terminal.print(_text(f"- {note}", "yellow"), width=_WIDTH)
        right = evaluation.table(summary.task, metric="primary", split=summary.split, items="right")
        terminal.print(_main_table(summary, primary, right))
        better = "" if summary.higher_is_better else "lower is better; "
        right_only = "; right: over the items answered rightly" if right else ""
        # A caption of the table would be as narrow as the table.
        legend = f"{better}* control; [95 % interval]; p: sign flips, corrected by Holm{right_only}"
        terminal.print(_text(legend, "dim italic"), soft_wrap=True)
        others = [row for row in rows if not row["primary"]]
        if full and others:
            terminal.print(_other_table(primary, others))
        terminal.print()
    if evaluation.out is not None:
        page = evaluation.out / "index.html"
        terminal.print(f"tables: {evaluation.out / 'table.csv'}; open {page} in a browser", style="dim", soft_wrap=True)


def _one_line(summary: TaskSummary, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Name the best method of a task, and the best control."""
    from flowgraph.pages.evaluation_page import figure

    # Rows come with the best method first.
    best = next((row for row in rows if not row["trivial"] and row["value"] is not None), None)
    parts = ["no method has a value"]
    if best is not None:
        parts = [f"{best['method']} {figure(best['value'])}"]
    control = next((row for row in rows if row["method"] == summary.best_control), None)
    if control is not None:
        parts.append(f"control {control['method']} {figure(control['value'])}")
    return _text(f"{summary.task} ({summary.split}): {', '.join(parts)}, n = {summary.num_usable}")


def _main_table(summary: TaskSummary, rows: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate the primary metric of a task: value, differences to both controls, p, and n."""
    from rich.table import Table

    from flowgraph.pages.evaluation_page import figure, interval, p_value

    # Columns without any entry are left out.
    has_control = summary.best_control is not None
    has_p = any(row["control_p_holm"] is not None for row in rows)
    # Where text_only is the best control, both differences are the same.
    has_text = any(row["text_difference"] is not None and row["control"] != "text_only" for row in rows)
    alone = {row["method"]: row for row in right}

    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True, max_width=_MAX_NAME)
    table.add_column(_text(summary.metric), justify="right", max_width=24)
    if has_control:
        table.add_column(_text(f"- {summary.best_control}*"), justify="right", max_width=24)
    if has_p:
        table.add_column("p", justify="right", no_wrap=True)
    if has_text:
        table.add_column("- text_only*", justify="right")
    if alone:
        table.add_column("right", justify="right", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)

    for row in rows:
        cells = [
            _text(f"{row['method']}{'*' if row['trivial'] else ''}"),
            f"{figure(row['value'])} {interval(row['low'], row['high']):>11}",
        ]
        if has_control:
            is_control = row["method"] == row["control"]
            difference = "" if is_control else figure(row["control_difference"], signed=True)
            cells.append(f"{difference} {interval(row['control_low'], row['control_high'], signed=True)}".strip())
        if has_p:
            cells.append(p_value(row["control_p_holm"]))
        if has_text:
            is_text = row["method"] == "text_only"
            difference = "" if is_text else figure(row["text_difference"], signed=True)
            cells.append(f"{difference} {interval(row['text_low'], row['text_high'], signed=True)}".strip())
        if alone:
            own = alone.get(row["method"])
            cells.append("" if own is None else figure(own["value"]))
        cells.append(str(row["n"]))
        table.add_row(*cells, style="dim" if row["trivial"] else "")
    return table


def _other_table(primary: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate the other metrics of a task, methods in the order of the main table."""
    from rich.table import Table

    from flowgraph.pages.evaluation_page import figure

    metrics = list(dict.fromkeys(row["metric"] for row in others))
    values = {(row["metric"], row["method"]): row["value"] for row in others}
    table = Table(box=None, pad_edge=False, title="other metrics", title_justify="left")
    table.add_column("method", no_wrap=True, max_width=_MAX_NAME)
    for name in metrics:
        table.add_column(_text(name), justify="right")
    for row in primary:
        name = f"{row['method']}{'*' if row['trivial'] else ''}"
        cells = [figure(values.get((metric, row["method"]))) for metric in metrics]
        table.add_row(_text(name), *cells, style="dim" if row["trivial"] else "")
    return table
