"""``flowgraph trace-corpus``: a file of prompts and responses."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowgraph.commands.common import (
    Damping,
    Device,
    Dtype,
    Heads,
    Keep,
    Layers,
    MaxNewTokens,
    Model,
    Preset,
    Rows,
    Source,
    console,
    head_choice,
    load_model,
    stages,
)

if TYPE_CHECKING:
    from flowgraph.corpus.run import CorpusProgress
    from flowgraph.corpus.trace_corpus import CorpusSummary

_EVERY = 5.0
"""Seconds between the lines of progress where there is no terminal."""


def trace_corpus(
    file: Annotated[Path, typer.Argument(help="JSON Lines: an object a line, with a prompt or messages.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; run again to go on in it.")],
    model: Model = "demo",
    prompt_field: Annotated[str, typer.Option(help="Key of the prompt: text or chat messages.")] = "prompt",
    messages_field: Annotated[str, typer.Option(help="Key of chat messages.")] = "messages",
    response_field: Annotated[str, typer.Option(help="Key of the response; generated where missing.")] = "response",
    id_field: Annotated[str, typer.Option(help="Key of the id.")] = "id",
    question_field: Annotated[
        str, typer.Option(help="Key of the question: literal text of the prompt; '' for none.")
    ] = "question",
    answer_field: Annotated[
        str, typer.Option(help="Key of the answer: literal text of the response; '' for none.")
    ] = "answer",
    question: Annotated[
        str | None, typer.Option(help="For lines without one: 'user', 'prompt' or a regular expression.")
    ] = None,
    answer: Annotated[str | None, typer.Option(help="For lines without one: a regular expression.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message in front of text prompts.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No chat template: a prompt is the text itself.")] = False,
    layers: Layers = "middle",
    heads: Heads = "mean",
    preset: Preset = "default",
    rows: Rows = None,
    source: Source = "uniform",
    damping: Damping = 1.0,
    max_new_tokens: MaxNewTokens = 256,
    keep: Keep = 0.9,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of one forward pass.")] = 512,
    html: Annotated[bool, typer.Option("--html", help="Also write a page for each trace.")] = False,
    tables: Annotated[
        str, typer.Option("--format", help="Of the tables: 'parquet' (needs pyarrow), 'csv', or 'auto'.")
    ] = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Throw earlier results in the folder away.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
) -> None:
    """Trace every line of a JSONL file; exit code 1 when a line could not be traced."""
    from flowgraph.corpus.requests import CorpusFields, scan
    from flowgraph.corpus.tables import table_format
    from flowgraph.corpus.trace_corpus import trace_corpus as run

    table_format(tables)
    names = CorpusFields(prompt_field, messages_field, response_field, id_field, question_field, answer_field)
    scan(file, names)  # a wrong file name should not have to wait for a model
    with stages() as progress:
        network, tokenizer = load_model(model, dtype, device, progress)
    try:
        with _reporting() as report:
            summary = run(
                network, tokenizer, file, out, fields=names, question=question, answer=answer, plain=plain,
                system=system, layers=layers, heads=head_choice(heads), preset=preset, rows=rows,
                source=source, damping=damping, max_new_tokens=max_new_tokens,  # type: ignore[arg-type]
                keep=keep, batch_tokens=batch_tokens, html=html, format=tables,
                restart=restart, progress=report,
            )  # fmt: skip
    except KeyboardInterrupt:
        again = "the same command" + (" without --restart" if restart else "")
        typer.secho(f"flowgraph: stopped; everything finished is in {out}: run {again} to go on from there", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    _print(summary)


@contextmanager
def _reporting() -> Iterator[Callable[[CorpusProgress], None]]:
    """A bar with rates and time left on standard error; lines of text where that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (BarColumn(), TextColumn("{task.fields[status]}", markup=False))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, status="starting")

        def report(at: CorpusProgress) -> None:
            if _is_news(at.stage):
                bar.console.print(at.stage, highlight=False, markup=False)
            bar.update(task, total=at.total, completed=at.done + at.failed, status=f"{_figures(at)}  {_short(at)}")

        yield report


class _Lines:
    """Progress as plain lines: news at once, figures every few seconds."""

    def __init__(self, console: Any) -> None:
        self.console, self.last, self.ended = console, -_EVERY, False

    def __call__(self, at: CorpusProgress) -> None:
        now = time.monotonic()
        if _is_news(at.stage):
            self.console.print(at.stage, highlight=False, markup=False, soft_wrap=True)
        elif now - self.last >= _EVERY or (at.done + at.failed == at.total and not self.ended):
            self.last, self.ended = now, at.done + at.failed == at.total
            self.console.print(_figures(at), highlight=False, markup=False, soft_wrap=True)


def _is_news(stage: str) -> bool:
    return " skipped: " in stage


def _short(at: CorpusProgress) -> str:
    return "" if _is_news(at.stage) else at.stage


def _figures(at: CorpusProgress) -> str:
    """``12/40 traced, 1 failed, 0.52 traces/s, 81 tokens/s, 0:54 left``."""
    parts = [f"{at.done}/{at.total} traced"]
    if at.failed:
        parts.append(f"{at.failed} failed")
    if at.seconds_left is not None:
        parts += [f"{at.traces_per_second:.2f} traces/s", f"{at.tokens_per_second:.0f} tokens/s"]
        parts.append(f"{_clock(at.seconds_left)} left")
    return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _print(summary: CorpusSummary) -> None:
    terminal = console()
    earlier = summary.traced - summary.now
    line = f"{summary.now} traced in {_clock(summary.seconds)}"
    line += f", {earlier} by earlier runs" if earlier else ""
    line += f", {len(summary.errors)} failed" if summary.errors else ""
    terminal.print(f"{line}; open {summary.index} in a browser", highlight=False, markup=False, soft_wrap=True)
    if not summary.errors:
        return
    if not summary.traced:
        number, message = summary.errors[0]
        typer.secho(f"flowgraph: no line could be traced; line {number}: {message}", err=True, fg=typer.colors.RED)
    else:
        terminal.print(f"the lines that failed: {summary.out / 'errors.jsonl'}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)
