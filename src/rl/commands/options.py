"""Options that the commands of flowgraph-rl share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowgraph import OutputError

TASKS = (
    "'chain', 'wandering', 'pathsearch', 'program', 'countdown', 'gsm_symbolic', 'chain_sum', 'reasoning_gym:NAME', a "
    ".jsonl or .parquet file or 'datasets:NAME'"
)
"""The values of ``--task``, for help texts."""

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A model name, a folder, or a shipped model: 'chain', 'wandering', 'pathsearch', 'program'.",
    ),
]
TaskModel = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="A model name or a folder. Default: the small model that is shipped for the task."
    ),
]
TaskName = Annotated[str, typer.Option("--task", "-t", help=f"{TASKS}.")]
TaskOption = Annotated[
    list[str] | None,
    typer.Option("--task-option", help="NAME=VALUE, such as hops=[2,4] or level=0:5; may be repeated."),
]
Adapter = Annotated[
    Path | None,
    typer.Option("--adapter", "-a", help="A trained policy: a run, a checkpoint, or a PEFT folder."),
]
Device = Annotated[str | None, typer.Option(help="'cpu', 'cuda', 'cuda:1' or 'mps'. Default: cpu.")]
Dtype = Annotated[str, typer.Option(help="'auto', 'float32', 'bfloat16' or 'float16', of the frozen base.")]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", help="'4bit': load the frozen base in 4 bits by bitsandbytes (QLoRA). Default: not."),
]


def make_folder(folder: Path) -> None:
    """Create the output folder before the long run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"out: must be a folder that can be made, got {folder} ({error.strerror}); choose another"
        ) from error
