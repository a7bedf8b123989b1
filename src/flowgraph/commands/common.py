"""What the commands share: options, the terminal, and the model that a user names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def _keep(share: float) -> float:
    if not 0 < share <= 1:
        raise typer.BadParameter(f"must lie in (0, 1], got {share:g}; 0.9 keeps the routes of 90 % of the flow")
    return share


Keep = Annotated[float, typer.Option(help="Share of the flow whose routes make the backbone.", callback=_keep)]
AllTokens = Annotated[bool, typer.Option("--all", help="List every token, not only the strongest.")]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A model name, a folder, a .gguf file, or 'demo' for the shipped SmolLM2-135M-Instruct."
    ),
]
Layers = Annotated[str, typer.Option(help="'middle', 'all', 'FIRST-LAST'.")]
Heads = Annotated[str, typer.Option(help="'mean', 'max', 'global', 'local', 'receiver' or indices like 0,3,5.")]
Preset = Annotated[str, typer.Option(help="'default' or 'paper' (arXiv 2606.10646).")]
Rows = Annotated[str | None, typer.Option(help="'emission', 'emission_all' or 'literal'; overrides the preset.")]
Source = Annotated[str, typer.Option(help="'uniform' or 'potential'.")]
Damping = Annotated[float, typer.Option(help="Factor per hop, in (0, 1].")]
MaxNewTokens = Annotated[int, typer.Option(help="Limit of a generated response.")]
Dtype = Annotated[str, typer.Option(help="'auto', 'float32', 'bfloat16' or 'float16'.")]
Device = Annotated[str, typer.Option(help="'cpu', 'cuda', 'cuda:1', 'mps'.")]


def head_choice(text: str) -> str | list[int]:
    """Names stay names; "0,3,5" are indices."""
    return [int(index) for index in text.split(",")] if text.replace(",", "").isdigit() else text


def load_model(model: str, dtype: str, device: str, progress: Callable[[str], None]) -> tuple[Any, Any]:
    """The model and the tokenizer that ``--model``, ``--dtype`` and ``--device`` name, ready for a pass.

    Raises:
        InvalidInputError: no such device or precision, or nothing that transformers can load.
    """
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

        network, tokenizer = load_demo_model(progress)
        kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        return network.to(device=torch.device(device), dtype=kind), tokenizer  # type: ignore[call-overload]
    looks_local = model.startswith((".", "/", "~")) or Path(model).exists()
    if looks_local and not model.endswith(".gguf") and not (Path(model) / "config.json").is_file():
        raise InvalidInputError(
            f"--model: must be a folder with a config.json, got {model!r} without one; "
            "check the path, or pass a hub name"
        )
    progress(f"loading {model}")
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


def outputs_in(out: Path | None) -> list[Path]:
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


def console() -> Console:
    """Standard output."""
    from rich.console import Console

    return Console()


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
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


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Show a warning as one plain line, without the place in the code that it came from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        typer.secho(f"flowgraph: warning: {warning.message}", err=True, fg=typer.colors.YELLOW)
