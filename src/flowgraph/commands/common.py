"""What the commands share: options, output files, the terminal, and the model that a user names."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console

DTYPES = ("auto", "float32", "bfloat16", "float16")
_RESULT_SUFFIXES = ("html", "json", "safetensors")
_BYTE_ORDER_MARK = "\ufeff"
_MAX_DIGITS = 7
"""Most digits of a number in a list, so that a typing error cannot make an endless range."""


def _check_keep(share: float) -> float:
    """Refuse a share outside (0, 1]."""
    if not 0 < share <= 1:
        raise typer.BadParameter(f"must lie in (0, 1], got {share:g}; 0.9 keeps the routes of 90 % of the flow")
    return share


# Options that several commands have, with one text of help each.
TraceFile = Annotated[Path, typer.Argument(help="A trace written by `flowgraph trace` or FlowTrace.save.")]
Keep = Annotated[float, typer.Option(help="Share of the flow whose routes make the backbone.", callback=_check_keep)]
AllTokens = Annotated[bool, typer.Option("--all", help="As --full, with every token, not only the strongest.")]
Full = Annotated[bool, typer.Option("--full", help="Print everything, not only what fits a screen.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print one line with the result, and no progress.")]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A model name, a folder, a .gguf file, or 'demo' for the shipped SmolLM2-135M-Instruct."
    ),
]
Layers = Annotated[str, typer.Option(help="'middle', 'upper', 'all', 'FIRST-LAST', 'FIRST-' or a list like 3,5,7-9.")]
Heads = Annotated[
    str, typer.Option(help="'mean', 'max', 'global', 'local', 'receiver' or a list of indices like 0,3,5.")
]
Capacity = Annotated[
    str | None,
    typer.Option(
        help="What an edge weighs: 'attention', 'vtrace_share', 'vtrace', 'sharp', 'sharp_max', 'centred', "
        "'value_norm', 'gradient_positive' (one backward pass), or 'relevance', which is signed. Default: that of the "
        "preset."
    ),
]
CompositionText = Annotated[
    str | None,
    typer.Option(
        "--composition",
        help="How edges become scores: 'flowtracer', 'cage', 'vtrace', 'hops', 'one_hop', 'katz' or 'rollout', with "
        "options after a colon, like hops:k=3. Default: as the capacity has it.",
    ),
]
TraceLayers = Annotated[
    str | None,
    typer.Option(
        help="'middle', 'upper', 'all', 'FIRST-LAST', 'FIRST-' or a list like 3,5,7-9. Default: as the capacity has it."
    ),
]
TraceHeads = Annotated[
    str | None,
    typer.Option(help="'mean', 'max', 'global', 'local', 'receiver' or a list of indices like 0,3,5. Default: mean."),
]
Preset = Annotated[
    str,
    typer.Option(
        help="'default', 'paper' (arXiv 2606.10646), or what is asked: 'evidence' (which tokens the answer used: "
        "--capacity relevance) or 'steps' (which step matters: --capacity vtrace_share)."
    ),
]
Rows = Annotated[str | None, typer.Option(help="'emission', 'emission_all' or 'literal'; overrides the preset.")]
Source = Annotated[str, typer.Option(help="'uniform' or 'potential'.")]
Damping = Annotated[float, typer.Option(help="Factor per hop, in (0, 1].")]
MaxNewTokens = Annotated[int, typer.Option(help="Limit of a generated response.")]
TemplateArguments = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        help="Arguments of the chat template as a JSON object, like '{\"enable_thinking\": false}'.",
        show_default=False,
    ),
]
Dtype = Annotated[str, typer.Option(help="'auto', 'float32', 'bfloat16' or 'float16'.")]
Device = Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:1', 'mps'.")]


def numbers(option: str, text: str) -> list[int]:
    """Read a list of numbers and ranges: "5,7-9" is 5, 7, 8, 9.

    Args:
        option: name of the option, without dashes, for the message.
        text: the list.

    Raises:
        BadParameter: anything else.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        # A single number is a range of one.
        if not dash:
            last = first
        if not is_short_number(first) or not is_short_number(last) or int(last) < int(first):
            raise typer.BadParameter(
                f"--{option} must be numbers and ranges like 5,7-9, got {text[:80]!r}; separate them by commas"
            )
        found += range(int(first), int(last) + 1)
    return found


def is_short_number(text: str) -> bool:
    """Return whether a text is a number of tokens, layers, heads or routes."""
    return text.isdecimal() and len(text) <= _MAX_DIGITS


def layer_choice(text: str) -> str | list[int]:
    """Read "3,5,7" as indices; the library reads names and single ranges itself."""
    if "," in text:
        return numbers("layers", text)
    return text


def head_choice(text: str) -> str | list[int]:
    """Read "0,3,5" as indices; the library reads names itself."""
    if text[:1].isdecimal():
        return numbers("heads", text)
    return text


def one_view(*, full: bool, quiet: bool) -> None:
    """Refuse two options that contradict each other.

    Raises:
        BadParameter: both are given.
    """
    if full and quiet:
        raise typer.BadParameter("--full and --quiet must not be given together, got both; leave one out")


def composition_choice(text: str | None) -> tuple[str | None, dict[str, Any] | None]:
    """Read "hops:k=3,normalize=false" as a name and its options, and check both before a model is loaded.

    Raises:
        BadParameter: an option that is not NAME=VALUE with a number, true or false.
        InvalidInputError: no such composition or option, or a value outside its range.
    """
    if text is None:
        return None, None
    from flowgraph.flow.compositions import find_composition

    name, colon, listed = text.partition(":")
    options: dict[str, Any] = {}
    for part in listed.split(",") if colon else []:
        option, equals, value = part.strip().partition("=")
        read = _option_value(value.strip())
        if not option or not equals or read is None:
            raise typer.BadParameter(
                f"--composition must be NAME or NAME:OPTION=VALUE,... with numbers, true or false, got {text[:80]!r}; "
                "e.g. hops:k=3"
            )
        options[option.strip()] = read
    find_composition(name).complete(options)
    return name, options or None


def _option_value(text: str) -> bool | int | float | str | None:
    """Read a truth value, a number or a name; None for nothing."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def template_arguments(text: str | None) -> dict[str, Any] | None:
    """Read the arguments of a chat template, a JSON object.

    Raises:
        BadParameter: anything else.
    """
    if text is None:
        return None
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        raise typer.BadParameter(
            f"--chat-template-kwargs must be a JSON object, got {text[:80]!r} ({reason}); "
            "e.g. '{\"enable_thinking\": false}'"
        ) from None
    if not isinstance(arguments, dict):
        raise typer.BadParameter(
            f"--chat-template-kwargs must be a JSON object, got {text[:80]!r}; e.g. '{{\"enable_thinking\": false}}'"
        )
    return arguments


def read_text(name: str, given: str | None, file: Path | None, *, read_stdin: bool = False) -> str | None:
    """Read a text from its argument, from a file, or from standard input.

    Files and standard input are UTF-8. An editor's byte order mark and the line break that ends the last line are
    removed, which standard error reports: the model would read them as part of the text.

    Args:
        name: what is read, for messages and for the name of the option.
        given: the argument.
        file: the file of ``--NAME-file``.
        read_stdin: read standard input where neither is given.

    Raises:
        BadParameter: both, no text, or bytes that are not UTF-8.
    """
    if given is not None and file is not None:
        raise typer.BadParameter(f"give the {name} as text or as --{name}-file, not both")
    if file is not None:
        try:
            raw = file.read_bytes()
        except (OSError, ValueError) as error:
            raise typer.BadParameter(
                f"--{name}-file must be a readable UTF-8 file, got {file} ({error}); check the path"
            ) from error
        return _cleaned(_decoded(raw, f"--{name}-file must be a readable UTF-8 file, got {file}"), str(file))
    if given is None and read_stdin:
        # A terminal would wait for input without a word.
        if sys.stdin is None or sys.stdin.isatty():
            raise typer.BadParameter(f"give the {name} as an argument, by --{name}-file, or on standard input")
        source = "standard input"
        buffer = getattr(sys.stdin, "buffer", None)
        text = sys.stdin.read() if buffer is None else _decoded(buffer.read(), f"{source} must be UTF-8, got others")
        return _cleaned(text, source)
    return given


def _decoded(raw: bytes, rule: str) -> str:
    """Decode UTF-8, and write every line break as a line feed."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(
            f"{rule} (byte 0x{raw[error.start]:02x} at position {error.start}); convert it to UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _cleaned(text: str, source: str) -> str:
    """Remove a byte order mark and the final line break, and report it."""
    removed = []
    if text.startswith(_BYTE_ORDER_MARK):
        text = text.removeprefix(_BYTE_ORDER_MARK)
        removed.append("the byte order mark")
    if text.endswith("\n"):
        text = text.removesuffix("\n")
        removed.append("the final line break")
    if removed:
        typer.echo(f"flowgraph: removed {' and '.join(removed)} of {source}", err=True)
    return text


def check_outputs(*paths: Path | None) -> None:
    """Check before a long run that the files can be written later; None names no file.

    Raises:
        OutputError: one of them cannot be written.
        BadParameter: two of them are the same file.
    """
    from flowgraph.files import check_writable

    named: list[Path] = []
    for path in paths:
        if path is None:
            continue
        check_writable(path)
        if path in named:
            raise typer.BadParameter(f"output options must each name a file of its own, got {path} twice; rename one")
        named.append(path)


def outputs_in(out: Path | None) -> list[Path]:
    """Name the three files of one trace; the folder is created, and checked, before the model runs.

    Raises:
        OutputError: the folder cannot be created, or a file in it cannot be written.
    """
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
    return [check_writable(out / f"trace.{suffix}") for suffix in _RESULT_SUFFIXES]


def load_model(model: str, dtype: str, device: str, progress: Callable[[str], None]) -> tuple[Any, Any]:
    """Load the model and the tokenizer that ``--model``, ``--dtype`` and ``--device`` name, in evaluation mode.

    Raises:
        InvalidInputError: no such device or precision, or nothing that transformers can load.
        MissingExtraError: the demo model is not installed.
    """
    from flowgraph.errors import InvalidInputError, first_line

    if dtype not in DTYPES:
        raise InvalidInputError(
            f"--dtype: must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}; 'auto' is the default"
        )
    _check_device(device)
    if model == "demo":
        return _load_demo(dtype, device, progress)

    # A path must exist here, because transformers would search for it on the hub. Names on the hub have at most one
    # slash.
    is_no_hub_name = model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith("/")
    looks_local = is_no_hub_name or Path(model).exists()
    is_weight_file = model.endswith(".gguf")
    if looks_local and not is_weight_file and not (Path(model) / "config.json").is_file():
        raise InvalidInputError(
            f"--model: must be a folder with a config.json, got {model!r} without one; "
            "check the path, or pass a hub name"
        )
    progress(f"loading {model}")
    try:
        return _load_pretrained(model, dtype, device)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InvalidInputError(
            f"--model: must be a causal language model that transformers can load, got {model!r} "
            f"({first_line(error)}); pass a folder with config.json and safetensors weights, a hub name, or 'demo'"
        ) from error


def _check_device(device: str) -> None:
    """Refuse a device on which no tensor can be made."""
    import torch

    from flowgraph.errors import InvalidInputError, first_line

    try:
        # The only portable way to learn whether a device can be used.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(
            f"--device: must be usable here, got {device!r} ({first_line(error)}); 'cpu' always is"
        ) from error


def _load_demo(dtype: str, device: str, progress: Callable[[str], None]) -> tuple[Any, Any]:
    """Load the demo model, which is stored in float32."""
    import torch

    from flowgraph.demo import load_demo_model

    precision: torch.dtype = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    network, tokenizer = load_demo_model(progress)
    return network.to(device=torch.device(device), dtype=precision), tokenizer  # type: ignore[call-overload]


def _load_pretrained(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Load a model by name, folder or .gguf file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    # The command shows its own progress.
    disable_progress_bar()
    name = model
    options = {}
    if model.endswith(".gguf"):
        # transformers wants the folder, and the file inside it.
        name = str(Path(model).parent)
        options["gguf_file"] = Path(model).name
    network: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    return network.to(device).eval(), tokenizer


def console() -> Console:
    """Return a console on standard output."""
    from rich.console import Console

    return Console()


@contextmanager
def stages(*, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show the current stage beside a spinner on standard error; as plain lines where that is not a terminal.

    Args:
        quiet: show nothing.
    """
    from rich.console import Console

    if quiet:

        def ignore(line: str) -> None:
            pass

        yield ignore
        return

    console = Console(stderr=True)
    # A spinner would fill a log with control characters.
    if not console.is_terminal:

        def print_line(line: str) -> None:
            # A line per generated token would fill a log.
            if not line.startswith("generating: "):
                console.print(line, highlight=False, markup=False)

        yield print_line
        return
    with console.status("starting") as status:

        def update(line: str) -> None:
            status.update(line)

        yield update


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Print warnings as plain lines, without the place in the code that they come from."""
    with warnings.catch_warnings(record=True) as caught:
        # Python shows a repeated warning only once by default.
        warnings.simplefilter("always", UserWarning)
        yield
    # Many texts may cause one warning.
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        typer.secho(f"flowgraph: warning: {message}", err=True, fg=typer.colors.YELLOW)
