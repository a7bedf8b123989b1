"""``flowgraph trace | demo``: trace one answer, print it, and write it to files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowgraph.commands.common import (
    AllTokens,
    Capacity,
    Damping,
    Device,
    Dtype,
    Keep,
    MaxNewTokens,
    Model,
    Preset,
    Rows,
    Source,
    TemplateArguments,
    TraceHeads,
    TraceLayers,
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

if TYPE_CHECKING:
    from flowgraph.steps.step_relevance import StepRelevance
    from flowgraph.text.selectors import Selector
    from flowgraph.tracing.flow_trace import FlowTrace


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
            help="Where flow enters: 'user', 'prompt' (all of it), or a regular expression. Default: the message."
        ),
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(help="Regular expression for the answer (group 1 if it has one; last match). Default: found."),
    ] = None,
    answer_span: Annotated[
        str | None, typer.Option(help="Characters START:END of the response that are the answer.")
    ] = None,
    last_line: Annotated[
        bool, typer.Option("--last-line", help="The last line of the response is the answer.")
    ] = False,
    capacity: Capacity = "attention",
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
        typer.Option("--relevance", help="Also print the conserved relevance of the answer between steps (backward)."),
    ] = False,
) -> None:
    """Trace one answer and print its tokens, backbone and certificate."""
    # Read and check every option before the model is loaded.
    text = read_text("prompt", prompt if prompt != "-" else None, prompt_file, read_stdin=True)
    given_response = read_text("response", response, response_file)
    for name, value in (("prompt", text), ("response", given_response)):
        if value is not None and not value.strip():
            raise typer.BadParameter(f"the {name} is empty; give some text")
    arguments = template_arguments(chat_template_kwargs)
    chosen_answer = _answer_choice(answer, answer_span, last_line)
    chosen_layers = None if layers is None else layer_choice(layers)
    chosen_heads = None if heads is None else head_choice(heads)

    with stages() as progress:
        # The folder is created and checked before the model is loaded.
        outputs = outputs_in(out)
        network, tokenizer = load_model(model, dtype, device, progress)
        prompt_or_chat = _as_chat(tokenizer, str(text), system, plain)
        if arguments and isinstance(prompt_or_chat, str):
            raise typer.BadParameter(
                "--chat-template-kwargs needs a chat template and a prompt that is not rendered; leave it out"
            )
        import flowgraph

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
                outputs=outputs,
                progress=progress,
            )
        found = _relevance(network, result, progress) if relevance else None
    _report(result, out, keep, all_tokens, found)


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
) -> None:
    """Trace a worked answer of SmolLM2-135M-Instruct, and write HTML, JSON and safetensors."""
    from flowgraph.demo import PROMPT, load_demo_model

    with stages() as progress:
        outputs = outputs_in(out)
        network, tokenizer = load_demo_model(progress)
        import flowgraph

        messages = [{"role": "user", "content": PROMPT}]
        result = flowgraph.trace(network, tokenizer, messages, outputs=outputs, progress=progress)
        found = _relevance(network, result, progress)
    _report(result, out, keep, all_tokens, found)


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


def _relevance(model: Any, result: FlowTrace, progress: Callable[[str], None]) -> StepRelevance | None:
    """Compute the relevance between steps; where it is not defined, print why and continue without it."""
    from flowgraph.errors import CaptureError, InvalidInputError

    progress("computing the relevance of the answer (one backward pass per hop)")
    try:
        with warnings_on_stderr():
            return result.relevance(model)
    except (CaptureError, InvalidInputError) as error:
        typer.echo(f"no relevance: {error}", err=True)
        return None


def _report(
    result: FlowTrace, out: Path | None, keep: float, all_tokens: bool, relevance: StepRelevance | None = None
) -> None:
    """Print a trace with its certificate, and write its files; exit code 1 when a check fails."""
    from flowgraph.commands.terminal import NUM_TOKEN_ROWS, certificate_table, relevance_tree, render_trace

    outputs = outputs_in(out)
    with stages() as progress:
        progress("finding the backbone")
        # Everything is computed and written before anything is printed.
        view = render_trace(result, keep=keep, rows=None if all_tokens else NUM_TOKEN_ROWS)
        progress("checking the flow")
        certificate = result.certify()
        for path in outputs:
            progress(f"writing {path}")
            _write(result, path)
    terminal = console()
    terminal.print(view)
    if relevance is not None:
        terminal.print()
        terminal.print(relevance_tree(relevance))
    terminal.print()
    terminal.print(certificate_table(certificate))
    if outputs:
        names = ", ".join(str(path) for path in outputs)
        terminal.print(f"\nwrote {names}; open the first in a browser", highlight=False)
    if not certificate.ok:
        raise typer.Exit(1)


def _write(result: FlowTrace, path: Path) -> None:
    """Write a trace in the format of the suffix."""
    if path.suffix == ".html":
        result.to_html(path)
    elif path.suffix == ".json":
        result.to_json(path)
    else:
        result.save(path)
