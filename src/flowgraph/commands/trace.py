"""``flowgraph trace | demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowgraph.commands.common import (
    AllTokens,
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
    outputs_in,
    stages,
)

if TYPE_CHECKING:
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
    layers: Layers = "middle",
    heads: Heads = "mean",
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
) -> None:
    """Trace one answer and print its tokens, backbone and certificate."""
    from flowgraph.text.regions import LastLine, Span

    text = _text("prompt", prompt if prompt != "-" else None, prompt_file, read_stdin=True)
    reply = _text("response", response, response_file)
    for name, value in (("prompt", text), ("response", reply)):
        if value is not None and not value.strip():
            raise typer.BadParameter(f"the {name} is empty; give some text")
    chosen: Any = answer
    if sum(option is not None and option is not False for option in (answer, answer_span, last_line)) > 1:
        raise typer.BadParameter("give one of --answer, --answer-span and --last-line")
    asked = question
    if answer_span is not None:
        chosen = Span(*_span("answer-span", answer_span))
    elif last_line:
        chosen = LastLine()
    with stages() as progress:
        outputs_in(out)
        network, tokenizer = load_model(model, dtype, device, progress)
        prompt_or_chat: Any = text
        if not plain and getattr(tokenizer, "chat_template", None):
            prompt_or_chat = [{"role": "system", "content": system}] if system else []
            prompt_or_chat.append({"role": "user", "content": text})
        elif system:
            raise typer.BadParameter("--system needs a chat template; write it into the prompt")
        import flowgraph

        result = flowgraph.trace(
            network, tokenizer, prompt_or_chat, reply, question=asked, answer=chosen, layers=layers,
            heads=head_choice(heads), preset=preset, rows=rows, source=source,  # type: ignore[arg-type]
            damping=damping, max_new_tokens=max_new_tokens, outputs=outputs_in(out), progress=progress,
        )  # fmt: skip
    _report(result, out, keep, all_tokens)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("out"),
    keep: Keep = 0.9,
    all_tokens: AllTokens = False,
) -> None:
    """Trace a worked answer of SmolLM2-135M-Instruct, and write HTML, JSON and safetensors."""
    from flowgraph.demo import PROMPT, load_demo_model

    with stages() as progress:
        outputs_in(out)
        network, tokenizer = load_demo_model(progress)
        import flowgraph

        result = flowgraph.trace(
            network, tokenizer, [{"role": "user", "content": PROMPT}], outputs=outputs_in(out), progress=progress
        )
    _report(result, out, keep, all_tokens)


def _text(name: str, given: str | None, file: Path | None, *, read_stdin: bool = False) -> str | None:
    if given is not None and file is not None:
        raise typer.BadParameter(f"give the {name} as text or as --{name}-file, not both")
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(
                f"--{name}-file must be a readable UTF-8 file, got {file} ({error}); check the path"
            ) from error
    if given is None and read_stdin:
        if sys.stdin is None or sys.stdin.isatty():
            raise typer.BadParameter(f"give the {name} as an argument, by --{name}-file, or on standard input")
        return sys.stdin.read()
    return given


def _span(name: str, text: str) -> tuple[int, int]:
    start, _, end = text.partition(":")
    try:
        return int(start), int(end)
    except ValueError:
        raise typer.BadParameter(f"--{name} must be START:END, got {text!r}; e.g. 120:124") from None


def _report(result: FlowTrace, out: Path | None, keep: float, all_tokens: bool) -> None:
    from flowgraph.commands.terminal import certificate_table, render_trace

    terminal = console()
    with stages() as progress:
        progress("finding the backbone")
        view = render_trace(result, keep=keep, rows=None if all_tokens else 24)
        progress("checking the flow")
        certificate = result.certify()
        for path in outputs_in(out):
            progress(f"writing {path}")
            {".html": result.to_html, ".json": result.to_json, ".safetensors": result.save}[path.suffix](path)
    terminal.print(view)
    terminal.print()
    terminal.print(certificate_table(certificate))
    if out is not None:
        terminal.print(
            f"\nwrote {', '.join(str(path) for path in outputs_in(out))}; open the first in a browser", highlight=False
        )
    if not certificate.ok:
        raise typer.Exit(1)
