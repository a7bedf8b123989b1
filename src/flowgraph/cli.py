"""The command line: ``flowgraph trace | certify | show | demo``. Heavy imports stay inside the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowgraph.errors import FlowgraphError

if TYPE_CHECKING:
    from rich.console import Console

    from flowgraph.flowtrace import FlowTrace

app = typer.Typer(
    name="flowgraph",
    help="Trace how a language model's answer drew on its question.",
    epilog="Exit codes: 0 done, 1 a check failed or something broke, 2 bad input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _keep(share: float) -> float:
    if not 0 < share <= 1:
        raise typer.BadParameter(f"must lie in (0, 1], got {share:g}; 0.9 keeps the routes of 90 % of the flow")
    return share


Keep = Annotated[float, typer.Option(help="Share of the flow whose routes make the backbone.", callback=_keep)]
AllTokens = Annotated[bool, typer.Option("--all", help="List every token, not only the strongest.")]


def main() -> None:
    """Run the command line; bad input ends with its message and exit code 2, never a stack trace."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except FlowgraphError as error:
        typer.secho(f"flowgraph: {error}", err=True, fg=typer.colors.RED)
        sys.exit(2)


@app.command()
def trace(
    prompt: Annotated[
        str | None, typer.Argument(help="The question; '-' or nothing reads standard input.", show_default=False)
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="A model name, a folder, a .gguf file, or 'demo' for the shipped SmolLM2-135M-Instruct.",
        ),
    ] = "demo",
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
    layers: Annotated[str, typer.Option(help="'middle', 'all', 'FIRST-LAST'.")] = "middle",
    heads: Annotated[
        str, typer.Option(help="'mean', 'max', 'global', 'local', 'receiver' or indices like 0,3,5.")
    ] = "mean",
    preset: Annotated[str, typer.Option(help="'default' or 'paper' (arXiv 2606.10646).")] = "default",
    rows: Annotated[
        str | None, typer.Option(help="'emission', 'emission_all' or 'literal'; overrides the preset.")
    ] = None,
    source: Annotated[str, typer.Option(help="'uniform' or 'potential'.")] = "uniform",
    damping: Annotated[float, typer.Option(help="Factor per hop, in (0, 1].")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of a generated response.")] = 256,
    dtype: Annotated[str, typer.Option(help="'auto', 'float32', 'bfloat16' or 'float16'.")] = "auto",
    device: Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:1', 'mps'.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for trace.html, trace.json and trace.safetensors.")
    ] = None,
    keep: Keep = 0.9,
    all_tokens: AllTokens = False,
) -> None:
    """Trace one answer and print its tokens, backbone and certificate."""
    from flowgraph.regions import LastLine, Span

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
    with _progress() as say:
        _outputs(out)
        network, tokenizer = _load(model, dtype, device, say)
        prompt_or_chat: Any = text
        if not plain and getattr(tokenizer, "chat_template", None):
            prompt_or_chat = [{"role": "system", "content": system}] if system else []
            prompt_or_chat.append({"role": "user", "content": text})
        elif system:
            raise typer.BadParameter("--system needs a chat template; write it into the prompt")
        import flowgraph

        result = flowgraph.trace(
            network, tokenizer, prompt_or_chat, reply, question=asked, answer=chosen, layers=layers,
            heads=_heads(heads), preset=preset, rows=rows, source=source,  # type: ignore[arg-type]
            damping=damping, max_new_tokens=max_new_tokens, outputs=_outputs(out), progress=say,
        )  # fmt: skip
    _report(result, out, keep, all_tokens)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("out"),
    keep: Keep = 0.9,
    all_tokens: AllTokens = False,
) -> None:
    """Trace a worked answer of SmolLM2-135M-Instruct, and write HTML, JSON and safetensors."""
    from flowgraph.demo import PROMPT, load_demo_model

    with _progress() as say:
        _outputs(out)
        network, tokenizer = load_demo_model(say)
        import flowgraph

        result = flowgraph.trace(
            network, tokenizer, [{"role": "user", "content": PROMPT}], outputs=_outputs(out), progress=say
        )
    _report(result, out, keep, all_tokens)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A trace written by `flowgraph trace` or FlowTrace.save.")],
    keep: Keep = 0.9,
    all_tokens: AllTokens = False,
    html: Annotated[Path | None, typer.Option(help="Also write the web page here.")] = None,
) -> None:
    """Print a saved trace."""
    from flowgraph.files import check_writable
    from flowgraph.flowtrace import load_trace
    from flowgraph.views.terminal import render_trace

    if html is not None:
        check_writable(html)
    result = load_trace(file)
    _console().print(render_trace(result, keep=keep, rows=None if all_tokens else 24))
    if html is not None:
        result.to_html(html, keep=keep)


@app.command()
def certify(
    file: Annotated[Path, typer.Argument(help="A saved trace.")],
    level: Annotated[
        str,
        typer.Option(
            help="fast: without the max flow; exact: with it; rational: recomputed in fractions too; auto: exact "
            "where the graph is small enough."
        ),
    ] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the certificate here.")] = None,
) -> None:
    """Check everything that is provable about a saved trace; exit code 1 when a check fails."""
    from flowgraph.files import check_writable
    from flowgraph.flowtrace import load_trace
    from flowgraph.payload import write_json
    from flowgraph.views.terminal import certificate_table

    if json_file is not None:
        check_writable(json_file)
    with _progress() as say:
        say("checking the flow")
        certificate = load_trace(file).certify(level=level)
    _console().print(certificate_table(certificate))
    if json_file is not None:
        write_json(json_file, certificate.to_dict())
    raise typer.Exit(0 if certificate.ok else 1)


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


def _heads(text: str) -> str | list[int]:
    """Names stay names; "0,3,5" are indices."""
    return [int(index) for index in text.split(",")] if text.replace(",", "").isdigit() else text


def _span(name: str, text: str) -> tuple[int, int]:
    start, _, end = text.partition(":")
    try:
        return int(start), int(end)
    except ValueError:
        raise typer.BadParameter(f"--{name} must be START:END, got {text!r}; e.g. 120:124") from None


def _outputs(out: Path | None) -> list[Path]:
    """The three files of one run; the folder is made, and checked, before anything heavy runs."""
    from flowgraph.errors import OutputError
    from flowgraph.files import check_writable

    if out is None:
        return []
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"--out: must be a folder that can be made, got {out} ({error.strerror}); choose another place"
        ) from error
    return [check_writable(out / f"trace.{suffix}") for suffix in ("html", "json", "safetensors")]


def _load(model: str, dtype: str, device: str, say: Callable[[str], None]) -> tuple[Any, Any]:
    from flowgraph.errors import InvalidInputError

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InvalidInputError(f"--dtype: must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}")
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InvalidInputError(f"--device: must be usable here, got {device!r} ({reason}); 'cpu' always is") from error
    if model == "demo":
        from flowgraph.demo import load_demo_model

        network, tokenizer = load_demo_model(say)
        kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        return network.to(device=torch.device(device), dtype=kind), tokenizer  # type: ignore[call-overload]
    looks_local = model.startswith((".", "/", "~")) or Path(model).exists()
    if looks_local and not model.endswith(".gguf") and not (Path(model) / "config.json").is_file():
        raise InvalidInputError(
            f"--model: must be a folder with a config.json, got {model!r} without one; "
            "check the path, or pass a hub name"
        )
    say(f"loading {model}")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # ours is already running
    path = Path(model)
    name, extra = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (model, {})
    try:
        network: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **extra)
        tokenizer = AutoTokenizer.from_pretrained(name, **extra)
        return network.to(device).eval(), tokenizer
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InvalidInputError(
            f"--model: must be a causal language model that transformers can load, got {model!r} ({reason}); "
            "pass a folder with config.json and safetensors weights, a hub name, or 'demo'"
        ) from error


def _report(result: FlowTrace, out: Path | None, keep: float, all_tokens: bool) -> None:
    from flowgraph.views.terminal import certificate_table, render_trace

    console = _console()
    with _progress() as say:
        say("finding the backbone")
        view = render_trace(result, keep=keep, rows=None if all_tokens else 24)
        say("checking the flow")
        certificate = result.certify()
        for path in _outputs(out):
            say(f"writing {path}")
            {".html": result.to_html, ".json": result.to_json, ".safetensors": result.save}[path.suffix](path)
    console.print(view)
    console.print()
    console.print(certificate_table(certificate))
    if out is not None:
        console.print(
            f"\nwrote {', '.join(str(path) for path in _outputs(out))}; open the first in a browser", highlight=False
        )
    if not certificate.ok:
        raise typer.Exit(1)


def _console() -> Console:
    from rich.console import Console

    return Console()


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A spinner with the current stage on standard error; plain lines where that is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield (
            lambda line: None if line.startswith("generating: ") else console.print(line, highlight=False, markup=False)
        )
        return
    with console.status("starting") as status:
        yield lambda line: status.update(line)


if __name__ == "__main__":
    main()
