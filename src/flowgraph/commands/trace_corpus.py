"""``flowgraph trace-corpus``: trace a file of prompts and responses."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

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
    from flowgraph.corpus.corpus_ray import CorpusRay
    from flowgraph.corpus.run import CorpusProgress
    from flowgraph.corpus.trace_corpus import CorpusSummary

_RAY = "--ray"


class CorpusCommand(TyperCommand):
    """A command whose option ``--ray`` may stand without a value, wherever it stands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give ``--ray`` the value ``local`` where no address follows, so that a file name is not taken for one."""
        given = list(args)
        end = given.index("--") if "--" in given else len(given)
        for place in range(end):
            if given[place] == _RAY and not _is_address(given[place + 1 : end]):
                given[place] = f"{_RAY}=local"
        return super().parse_args(ctx, given)


def _is_address(rest: list[str]) -> bool:
    """Return whether the next argument is an address of Ray, also one of a kind that is refused."""
    from flowgraph.corpus.corpus_ray import is_address

    return bool(rest) and (is_address(rest[0]) or rest[0].startswith("ray://"))


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
    ray: Annotated[
        str | None,
        typer.Option(
            _RAY,
            metavar="[ADDRESS]",
            help="Trace on Ray (pip install 'flowgraph-llm[ray]'): HOST:PORT of a cluster, 'auto' for the one of this "
            "machine, or no address to start Ray here. The folder and the model must be reachable everywhere.",
            show_default=False,
        ),
    ] = None,
    ray_workers: Annotated[
        int | None, typer.Option(help="With --ray: worker processes, each with a model. Default: as many as fit.")
    ] = None,
    ray_threads: Annotated[
        int | None, typer.Option(help="With --ray: threads of a worker; they decide the rounding. Default: as here.")
    ] = None,
    ray_retries: Annotated[
        int | None, typer.Option(help="With --ray: retries of a line whose worker died. Default: 3.")
    ] = None,
    object_store_memory: Annotated[
        int | None,
        typer.Option(help="With --ray: bytes of its object store. Default: 209715200 for a Ray of its own."),
    ] = None,
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
    settings = {
        "workers": ray_workers,
        "threads": ray_threads,
        "retries": ray_retries,
        "object_store_memory": object_store_memory,
    }
    cluster = _cluster(ray, settings, model, dtype, device)
    with stages(quiet=quiet) as progress:
        # With Ray, this process only encodes, and the workers hold the model on the device.
        network, tokenizer = load_model(model, dtype, device if cluster is None else "cpu", progress)

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
                ray=cluster,
            )
    except KeyboardInterrupt:
        # With --restart again, the finished lines would be removed.
        again = "the same command without --restart" if restart else "the same command"
        typer.secho(f"flowgraph: stopped; everything finished is in {out}: run {again} to continue", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    _print(summary)


def _cluster(
    address: str | None, settings: dict[str, int | None], model: str, dtype: str, device: str
) -> CorpusRay | None:
    """Read the options of Ray, and check them before a model is loaded; None for one process.

    Raises:
        BadParameter: an option of Ray without ``--ray``.
        InvalidInputError: a value outside its range, or a device that Ray does not assign.
        MissingExtraError: Ray Data is missing or too old.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if address is None:
        if given:
            option = next(iter(given))
            name = option if option == "object_store_memory" else f"ray_{option}"
            raise typer.BadParameter(
                f"--{name.replace('_', '-')} must stand with --ray, got {given[option]} without; add --ray, or leave "
                "it out"
            )
        return None
    from flowgraph.corpus.corpus_ray import CorpusRay, ray_choice

    # Another working directory must not lead to another model.
    name = str(Path(model).absolute()) if Path(model).exists() else model
    load = partial(load_model, name, dtype, device, _no_progress)
    return ray_choice(CorpusRay(address=address, device=device, load=load, **given))


def _no_progress(_: str) -> None:
    """Show nothing: the stages of a worker would mix with those of the others."""


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
