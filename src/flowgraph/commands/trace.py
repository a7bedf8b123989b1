"""``flowgraph trace | demo``: trace one answer, print it, and write it to files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowgraph.commands.common import (
    AllTokens,
    Capacity,
    CompositionText,
    Damping,
    Device,
    Dtype,
    Full,
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
    outputs_in,
    read_text,
    stages,
    template_arguments,
    warnings_on_stderr,
)
from flowgraph.commands.views import View

if TYPE_CHECKING:
    from flowgraph.text.selectors import Selector
    from flowgraph.tracing.baselines import Baselines
    from flowgraph.tracing.edge import EdgeParts
    from flowgraph.tracing.flow_trace import FlowTrace
    from flowgraph.tracing.relevance_trace import RelevanceTrace

_DEMO_CAPACITIES = ("vtrace_share", "sharp")
"""Capacities whose scores the page of the demo can show beside the flow."""

_DEMO_EDGES = 200
"""Edges of the flow, and of the relevance, whose layers and heads the page of the demo shows."""


@dataclass(frozen=True)
class PageExtras:
    """What the page and the JSON file of a trace hold besides its flow.

    Attributes:
        relevance: the relevance of the same answer.
        beside: traces of the same tokens with other capacities.
        edge_parts: layers and heads of the strongest edges.
        baselines: rankings without a flow; None: those that need no model.
    """

    relevance: RelevanceTrace | None = None
    beside: Sequence[FlowTrace] = ()
    edge_parts: Sequence[EdgeParts] = ()
    baselines: Baselines | None = None


def trace(
    prompt: Annotated[
        str | None, typer.Argument(help="The question; '-' or nothing reads standard input.", show_default=False)
    ] = None,
    model: Model = "demo",
    prompt_file: Annotated[Path | None, typer.Option(help="Read the question from a file.")] = None,
    response: Annotated[str | None, typer.Option(help="The model's response; generated when not given.")] = None,
    response_file: Annotated[Path | None, typer.Option(help="Read the response from a file.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message for the chat template.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No chat template: the prompt is the text itself.")] = False,
    chat_template_kwargs: TemplateArguments = None,
    question: Annotated[
        str | None,
        typer.Option(
            help="Where flow enters: 'user', 'prompt' (all of it), text, or a regular expression. "
            "Default: the last user message."
        ),
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(help="Text of the answer, or a regular expression (its group 1; last match). Default: found."),
    ] = None,
    answer_span: Annotated[
        str | None, typer.Option(help="Characters START:END of the response that are the answer.")
    ] = None,
    last_line: Annotated[
        bool, typer.Option("--last-line", help="The last line of the response is the answer.")
    ] = False,
    capacity: Capacity = None,
    composition: CompositionText = None,
    layers: TraceLayers = None,
    heads: TraceHeads = None,
    preset: Preset = "default",
    rows: Rows = None,
    source: Source = "uniform",
    damping: Damping = 1.0,
    max_new_tokens: MaxNewTokens = 256,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for trace.html, trace.json and trace.safetensors.")
    ] = None,
    keep: Keep = 0.9,
    all_tokens: AllTokens = False,
    relevance: Annotated[
        bool,
        typer.Option(
            "--relevance",
            help="Also compute the conserved relevance of the answer (backward passes); print it by steps.",
        ),
    ] = False,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="Another capacity whose scores the page can show; may be repeated.", show_default=False),
    ] = None,
    edge_parts: Annotated[
        int,
        typer.Option(
            min=0,
            help="Split this many of the strongest edges by layers and heads, for trace.html and trace.json; one more "
            "capture.",
        ),
    ] = 0,
    gradient: Annotated[
        bool,
        typer.Option(help="Also compare the ranking with gradient x input: one more forward and one backward pass."),
    ] = True,
    full: Full = False,
    quiet: Quiet = False,
) -> None:
    """Trace one answer; print it with its strongest tokens and routes, and check the flow."""
    # Read and check every option before the model is loaded.
    view = View(full=full, quiet=quiet, all_tokens=all_tokens, relevance=relevance, keep=keep)
    text = read_text("prompt", prompt if prompt != "-" else None, prompt_file, read_stdin=True)
    given_response = read_text("response", response, response_file)
    for name, value in (("prompt", text), ("response", given_response)):
        if value is not None and not value.strip():
            raise typer.BadParameter(f"the {name} is empty; give some text")
    arguments = template_arguments(chat_template_kwargs)
    chosen_answer = _answer_choice(answer, answer_span, last_line)
    chosen_layers = None if layers is None else layer_choice(layers)
    chosen_heads = None if heads is None else head_choice(heads)
    composition_name, composition_options = composition_choice(composition)

    with stages(quiet=quiet) as progress:
        # The folder is created and checked before the model is loaded.
        outputs = outputs_in(out)
        network, tokenizer = load_model(model, dtype, device, progress)
        prompt_or_chat = _as_chat(tokenizer, str(text), system, plain)
        if arguments and isinstance(prompt_or_chat, str):
            raise typer.BadParameter(
                "--chat-template-kwargs needs a chat template and a prompt that is not rendered; leave it out"
            )
        import flowgraph
        from flowgraph import RelevanceTrace

        with warnings_on_stderr():
            result = flowgraph.trace(
                network,
                tokenizer,
                prompt_or_chat,
                given_response,
                question=question,
                answer=chosen_answer,
                chat_template_kwargs=arguments,
                capacity=capacity,
                layers=chosen_layers,
                heads=chosen_heads,
                preset=preset,
                rows=rows,
                source=source,  # type: ignore[arg-type]
                damping=damping,
                max_new_tokens=max_new_tokens,
                composition=composition_name,
                composition_options=composition_options,
                outputs=outputs,
                progress=progress,
            )
        if isinstance(result, RelevanceTrace):
            extras = PageExtras(
                edge_parts=_edge_parts(network, [result], edge_parts, progress),
                baselines=_baselines(network, result, gradient and (not quiet or out is not None), progress),
            )
            _report_relevance(result, outputs, view, extras, progress)
            return
        found = _relevance(network, result, progress) if relevance else None
        extras = PageExtras(
            relevance=found,
            beside=_beside(network, result, beside, progress),
            edge_parts=_edge_parts(network, [result, found], edge_parts, progress),
            baselines=_baselines(network, result, gradient and (not quiet or out is not None), progress),
        )
    _report(result, out, view, extras)


def _as_chat(tokenizer: Any, text: str, system: str | None, plain: bool) -> str | list[dict[str, Any]]:
    """Make the prompt a user's message for a chat model; a base model, or a rendered prompt, keeps the text itself."""
    from flowgraph.text.rendered_chat import recognise_rendered

    has_template = bool(getattr(tokenizer, "chat_template", None))
    if plain or not has_template or recognise_rendered(tokenizer, text) is not None:
        if system:
            raise typer.BadParameter("--system needs a chat template; write it into the prompt")
        return text
    messages = [{"role": "user", "content": text}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("out"),
    keep: Keep = 0.9,
    all_tokens: AllTokens = False,
    full: Full = False,
    quiet: Quiet = False,
) -> None:
    """Trace a worked answer of SmolLM2-135M-Instruct, and write HTML, JSON and safetensors."""
    from flowgraph.demo import PROMPT, load_demo_model

    view = View(full=full, quiet=quiet, all_tokens=all_tokens, keep=keep)
    with stages(quiet=quiet) as progress:
        outputs = outputs_in(out)
        network, tokenizer = load_demo_model(progress)
        import flowgraph

        messages = [{"role": "user", "content": PROMPT}]
        result = flowgraph.trace(network, tokenizer, messages, outputs=outputs, progress=progress)
        found = _relevance(network, result, progress)
        extras = PageExtras(
            relevance=found,
            beside=_beside(network, result, _DEMO_CAPACITIES, progress),
            edge_parts=_edge_parts(network, [result, found], _DEMO_EDGES, progress),
            baselines=_baselines(network, result, True, progress),
        )
    _report(result, out, view, extras)


def _answer_choice(pattern: str | None, span: str | None, last_line: bool) -> str | Selector | None:
    """Read the three options that choose the answer; None: it is found."""
    from flowgraph.text.selectors import LastLine, Span

    num_given = (pattern is not None) + (span is not None) + last_line
    if num_given > 1:
        raise typer.BadParameter("give one of --answer, --answer-span and --last-line")
    if last_line:
        return LastLine()
    if span is None:
        return pattern
    start, _, end = span.partition(":")
    try:
        return Span(int(start), int(end))
    except ValueError:
        raise typer.BadParameter(f"--answer-span must be START:END, got {span!r}; e.g. 120:124") from None


def _relevance(model: Any, result: FlowTrace, progress: Callable[[str], None]) -> RelevanceTrace | None:
    """Compute the relevance of the answer; where it is not defined, print why and continue without it."""
    from flowgraph.errors import CaptureError, InvalidInputError

    progress("computing the relevance of the answer (one backward pass per hop)")
    try:
        with warnings_on_stderr():
            return result.relevance(model)
    except (CaptureError, InvalidInputError) as error:
        typer.echo(f"no relevance: {error}", err=True)
        return None


def _beside(
    model: Any, result: FlowTrace, capacities: Sequence[str] | None, progress: Callable[[str], None]
) -> list[FlowTrace]:
    """Trace the same tokens and regions with other capacities."""
    import flowgraph

    others = []
    for capacity in capacities or ():
        progress(f"tracing with the capacity {capacity}")
        other = flowgraph.trace(
            model,
            input_ids=result.token_ids,
            prompt_length=int((~result.generated).sum()),
            question=result.question,
            reasoning=result.reasoning,
            answer=result.answer,
            capacity=capacity,
        )
        others.append(other)
    return others


def _edge_parts(
    model: Any, results: Sequence[FlowTrace | RelevanceTrace | None], count: int, progress: Callable[[str], None]
) -> list[EdgeParts]:
    """Split the strongest edges of each trace by layers and heads; where that is not defined, print why."""
    from flowgraph.errors import CaptureError, InvalidInputError
    from flowgraph.tracing.flow_trace import FlowTrace

    parts: list[EdgeParts] = []
    for result in results:
        if result is None or not count:
            continue
        kind = "flow" if isinstance(result, FlowTrace) else "relevance"
        progress(f"splitting the {count} strongest edges of the {kind} by layers and heads")
        try:
            parts += result.edge_parts(model, count)
        except (CaptureError, InvalidInputError) as error:
            typer.echo(f"no layers and heads of edges: {error}", err=True)
    return parts


def _baselines(
    model: Any, result: FlowTrace | RelevanceTrace, with_gradient: bool, progress: Callable[[str], None]
) -> Baselines | None:
    """Compare the ranking with baselines, gradient x input included; None where those without a model do."""
    from flowgraph.tracing.baselines import can_rank

    if not with_gradient or not can_rank(result):
        return None
    progress("comparing the ranking with gradient x input (one backward pass)")
    return result.baselines(model)


def _report(result: FlowTrace, out: Path | None, view: View, extras: PageExtras) -> None:
    """Print a trace with its certificate, and write its files; exit code 1 when a check fails."""
    outputs = outputs_in(out)
    with stages(quiet=view.quiet) as progress:
        progress("finding the routes")
        # Everything is computed and written before anything is printed.
        # The tree of the relevance takes the place of the strongest tokens.
        relevance = extras.relevance
        rendered = view.of_trace(result, with_tokens=relevance is None)
        progress("checking the flow")
        certificate = result.certify()
        for path in outputs:
            progress(f"writing {path}")
            _write(result, path, extras)
    terminal = console()
    terminal.print(rendered)
    if relevance is not None:
        for part in view.of_relevance(relevance.steps()):
            terminal.print(part)
    for part in view.of_baselines(result, extras.baselines):
        terminal.print(part)
    for part in view.of_certificate(certificate):
        terminal.print(part)
    view.print_end(terminal, outputs)
    if not certificate.ok:
        raise typer.Exit(1)


def _report_relevance(
    result: RelevanceTrace,
    outputs: Sequence[Path],
    view: View,
    extras: PageExtras,
    progress: Callable[[str], None],
) -> None:
    """Print a relevance trace with its certificate, and write its files; exit code 1 when a check fails."""
    from flowgraph.commands.terminal import relevance_tree

    certificate = result.certify()
    for path in outputs:
        progress(f"writing {path}")
        if path.suffix == ".html":
            result.to_html(path, edge_parts=extras.edge_parts, baselines=extras.baselines)
        elif path.suffix == ".json":
            result.to_json(path, edge_parts=extras.edge_parts, baselines=extras.baselines)
        else:
            result.save(path)
    terminal = console()
    if not view.quiet:
        terminal.print(relevance_tree(result.steps()))
    for part in view.of_baselines(result, extras.baselines):
        terminal.print(part)
    for part in view.of_certificate(certificate):
        terminal.print(part)
    view.print_end(terminal, outputs)
    if not certificate.ok:
        raise typer.Exit(1)


def _write(result: FlowTrace, path: Path, extras: PageExtras) -> None:
    """Write a trace in the format of the suffix."""
    shown = {
        "relevance": extras.relevance,
        "beside": extras.beside,
        "edge_parts": extras.edge_parts,
        "baselines": extras.baselines,
    }
    if path.suffix == ".html":
        result.to_html(path, **shown)  # type: ignore[arg-type]
    elif path.suffix == ".json":
        result.to_json(path, **shown)
    else:
        result.save(path)
