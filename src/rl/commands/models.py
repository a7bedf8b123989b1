"""``flowgraph-rl pretrain`` and ``merge``: make a base model, and merge an adapter into its base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from rl.commands.options import Dtype, Model
from rl.commands.terminal import spinner
from rl.errors import ConfigError


def pretrain_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new model.")],
    task: Annotated[
        str, typer.Option("--task", "-t", help="'chain', 'wandering', 'pathsearch' or 'program'.")
    ] = "chain",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="NAME=VALUE of the recipe, such as steps=300 or width=64; may be repeated."),
    ] = None,
) -> None:
    """Train a small base model from scratch on a task of the package: the shipped one, or your own variant of it."""
    from rl.commands.run_file import parse_options

    options = parse_options(settings or [])

    with spinner() as progress:
        progress("loading torch")
        from rl.base_models.pretrain import find_recipe, measurements, pretrain

        kind = find_recipe(task)
        _check_names(options, [item.name for item in fields(kind)])
        recipe = kind(**options)
        total = sum(cycle.steps for cycle in recipe.cycles)
        report = pretrain(out, recipe, progress=lambda step, loss: progress(f"update {step}/{total}, loss {loss:.3f}"))

    typer.echo(f"wrote {out}: {report['num_parameters']:,} parameters")
    for name, measured in measurements(report).items():
        sampled = measured["sampled"]["all"]
        greedy = measured["greedy"]["all"]
        typer.echo(
            f"{name}: right on {sampled['share']:.1%} of {sampled['n']} fresh problems when sampled, on "
            f"{greedy['share']:.1%} greedily"
        )
    typer.echo(f"next: flowgraph-rl train --task {task} --model {out}")


def merge(
    adapter: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a PEFT folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the merged model.")],
    model: Model = "chain",
    dtype: Dtype = "auto",
) -> None:
    """Merge a trained adapter into its base; plain transformers loads the result."""
    from rl.commands.run_file import policy_folder

    if out.exists():
        raise ConfigError(f"out: must be a new folder, got {out}, which exists; choose another name")

    with spinner() as progress:
        progress(f"loading {model}")
        from rl.folders import new_folder
        from rl.policy.loading import load_policy
        from rl.policy.merging import merge_adapter

        network, tokenizer = load_policy(model, dtype, None, policy_folder(adapter))
        progress("merging")
        merged = merge_adapter(network)
        with new_folder(out) as temporary:
            merged.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    typer.echo(f"wrote {out}")


def _check_names(options: Iterable[str], names: Sequence[str]) -> None:
    """Refuse a name that is not a setting of the recipe."""
    for name in options:
        if name not in names:
            raise ConfigError(f"--set: must name a setting of the recipe, got {name!r}; there are {', '.join(names)}")
