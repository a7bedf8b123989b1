"""``flowgraph trace-corpus``: trace a file of prompts and responses."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph.commands.common import (
    Capacity,
    CompositionText,
    Damping,
    Device,
    Dtype,
    Keep,
    MaxNewTokens,
    Model,
    Preset,
    Quiet,
    Rows,
    Source,
    TemplateArguments,
    TraceHeads,
    TraceLayers,
    composition_choice,
    console,
    head_choice,
    layer_choice,
    load_model,
    stages,
    template_arguments,
    warnings_on_stderr,
)
from flowgraph.commands.progress import clock, reporting

if TYPE_CHECKING:
    from flowgraph.corpus.run import CorpusProgress
    from flowgraph.corpus.trace_corpus import CorpusSummary


def trace_corpus(
    file: Annotated[Path, typer.Argument(help="JSON Lines: an object a line, with a prompt or messages.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; run again to continue.")],
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
        str | None, typer.Option(help="For lines without one: 'user', 'prompt', text or a regular expression.")
    ] = None,
    answer: Annotated[str | None, typer.Option(help="For lines without one: text or a regular expression.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message in front of text prompts.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No chat template: a prompt is the text itself.")] = False,
    chat_template_kwargs: TemplateArguments = None,
    chat_template_kwargs_field: Annotated[
        str, typer.Option(help="Key of a line's arguments of the chat template; '' for none.")
    ] = "chat_template_kwargs",
    capacity: Capacity = None,
    composition: CompositionText = None,
    layers: TraceLayers = None,
    heads: TraceHeads = None,
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
    restart: Annotated[bool, typer.Option("--restart", help="Remove earlier results from the folder.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Trace every line of a JSONL file; exit code 1 when a line could not be traced."""
    import flowgraph
    from flowgraph.corpus.requests import scan
    from flowgraph.corpus.tables import table_format

    # A wrong format, field or file name is reported before the model is loaded.
    table_format(tables)
    fields = flowgraph.CorpusFields(
        prompt=prompt_field,
        messages=messages_field,
        response=response_field,
        id=id_field,
        question=question_field,
        answer=answer_field,
        chat_template_kwargs=chat_template_kwargs_field,
    )
    arguments = template_arguments(chat_template_kwargs)
    scan(file, fields)
    chosen_layers = None if layers is None else layer_choice(layers)
    chosen_heads = None if heads is None else head_choice(heads)
    composition_name, composition_options = composition_choice(composition)
    with stages(quiet=quiet) as progress:
        network, tokenizer = load_model(model, dtype, device, progress)

    try:
        with warnings_on_stderr(), reporting(_figures, quiet=quiet, failed=_num_failed) as report:
            summary = flowgraph.trace_corpus(
                network,
                tokenizer,
                file,
                out,
                fields=fields,
                question=question,
                answer=answer,
                plain=plain,
                system=system,
                chat_template_kwargs=arguments,
                capacity=capacity,
                composition=composition_name,
                composition_options=composition_options,
                layers=chosen_layers,
                heads=chosen_heads,
                preset=preset,
                rows=rows,
                source=source,  # type: ignore[arg-type]
                damping=damping,
                max_new_tokens=max_new_tokens,
                keep=keep,
                batch_tokens=batch_tokens,
                html=html,
                format=tables,
                restart=restart,
                progress=report,
            )
    except KeyboardInterrupt:
        # With --restart again, the finished lines would be removed.
        again = "the same command without --restart" if restart else "the same command"
        typer.secho(f"flowgraph: stopped; everything finished is in {out}: run {again} to continue", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    _print(summary)


def _num_failed(state: CorpusProgress) -> int:
    """Return the number of lines that could not be traced."""
    return state.failed


def _figures(state: CorpusProgress) -> str:
    """Format counts, rates and time left: ``12/40 traced, 1 failed, 0.52 traces/s, 81 tokens/s, 0:54 left``."""
    parts = [f"{state.done}/{state.total} traced"]
    if state.failed:
        parts.append(f"{state.failed} failed")
    if state.seconds_left is not None:
        parts.append(f"{state.traces_per_second:.2f} traces/s")
        parts.append(f"{state.tokens_per_second:.0f} tokens/s")
        parts.append(f"{clock(state.seconds_left)} left")
    return ", ".join(parts)


def _print(summary: CorpusSummary) -> None:
    """Print the outcome of a run; exit code 1 when a line failed."""
    parts = [f"{summary.now} traced in {clock(summary.seconds)}"]
    num_earlier = summary.traced - summary.now
    if num_earlier:
        parts.append(f"{num_earlier} by earlier runs")
    if summary.errors:
        parts.append(f"{len(summary.errors)} failed")
    terminal = console()
    line = f"{', '.join(parts)}; open {summary.index} in a browser"
    terminal.print(line, highlight=False, markup=False, soft_wrap=True)
    if not summary.errors:
        return
    # Where every line failed, the first message likely explains all of them.
    if summary.traced:
        terminal.print(f"the lines that failed: {summary.out / 'errors.jsonl'}", highlight=False, soft_wrap=True)
    else:
        number, message = summary.errors[0]
        typer.secho(f"flowgraph: no line could be traced; line {number}: {message}", err=True, fg=typer.colors.RED)
    raise typer.Exit(1)
