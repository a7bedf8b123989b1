"""``flowgraph-rl train``: train a policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowgraph import atomic_write
from rl.commands.options import Adapter, Dtype, Quantize, TaskOption
from rl.commands.terminal import console, spinner, table

if TYPE_CHECKING:
    from rl.commands.run_file import Run
    from rl.training.trainer import PPOTrainer

_SUMMARY = (
    ("reward", "reward", ".3f"),
    ("with an answer", "answer_share", ".1%"),
    ("entropy", "entropy", ".3f"),
    ("tokens a response", "response_tokens", ".1f"),
    ("seconds a step", "seconds", ".2f"),
    ("credit overhead, %", "credit_overhead_percent", ".1f"),
)
"""Rows of the summary: label, name of the logged figure, format."""


def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="A YAML file: any setting of PPOConfig, and model, task, task_options, output.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A model name or a folder. Default: the shipped model of the task."),
    ] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="As for eval. Default: chain.")] = None,
    task_option: TaskOption = None,
    credit: Annotated[
        str | None,
        typer.Option(
            "--credit",
            "-c",
            help="A credit rule; `flowgraph-rl rules` lists them. Recommended: reach_sharp with -s credit.shape=soft "
            "-s credit.floor=0.5 -s credit.ceiling=2 -s credit.fallback=0.5.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Rollout-and-update steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="NAME=VALUE for any setting, such as credit.strength=2; may be repeated."),
    ] = None,
    adapter: Adapter = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run. Default: runs/TASK-RULE.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue from the newest complete checkpoint in the folder; start where there is none."
        ),
    ] = False,
    allow_changes: Annotated[bool, typer.Option("--allow-changes", help="Resume although settings differ.")] = False,
    tracker: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb or trackio; may be repeated.")] = None,
    show_settings: Annotated[
        bool, typer.Option("--show-settings", help="Print all settings as YAML and stop.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="'cpu'. Default: the device that accelerate finds.")] = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Train a policy; write metrics.jsonl, checkpoints and rollouts into a folder."""
    from rl.commands.run_file import optional_policy_folder, read_run

    # Flags that were not given must not override the file: their value is None.
    flags = {"model": model, "task": task, "steps": steps, "seed": seed, "quantize": quantize}
    if output is not None:
        flags["output"] = str(output)
    run = read_run(config, flags, credit=credit, settings=settings or [], task_options=task_option or [])
    if show_settings:
        typer.echo(run.to_yaml(), nl=False)
        return

    from rl.training.tracking import check_trackers

    # Refuse an unknown tracker before the model is loaded, which takes seconds.
    trackers = tracker or []
    check_trackers(trackers)

    with spinner() as progress:
        progress(f"loading {run.model}")
        from rl.policy.loading import load_policy
        from rl.tasks.registry import make_task
        from rl.training.distributed import make_accelerator
        from rl.training.trainer import PPOTrainer

        folder = optional_policy_folder(adapter)
        network, tokenizer = load_policy(run.model, dtype, device, folder, quantize=run.quantize)
        trainer = PPOTrainer(
            network,
            tokenizer,
            task=make_task(run.task, **run.task_options),
            config=run.config,
            output=run.output,
            resume=resume,
            allow_changes=allow_changes,
            trackers=trackers,
            accelerator=make_accelerator(run.output, trackers, device),
        )

    # Every process trains; the main process alone writes and prints.
    is_main = trainer.accelerator.is_main_process
    if is_main:
        _announce(run, trainer)
    history = trainer.train()
    if is_main:
        _print_summary(history, run)


def _announce(run: Run, trainer: PPOTrainer) -> None:
    """Write the settings into the run's folder, and print what differs from a fresh run of one process."""
    with atomic_write(run.output / "run.yaml") as temporary:
        temporary.write_text(run.to_yaml(), encoding="utf-8")
    num_processes = trainer.accelerator.num_processes
    if num_processes > 1:
        typer.echo(f"{num_processes} processes share the work", err=True)
    if trainer.position.step:
        typer.echo(f"resumed after step {trainer.position.step}", err=True)


def _print_summary(history: list[dict[str, Any]], run: Run) -> None:
    """Print the mean figures of the first and the last tenth of the steps."""
    window = max(1, len(history) // 10)
    rows = table("figure", f"first {window} steps", f"last {window} steps")
    for label, name, form in _SUMMARY:
        first = _mean(history[:window], name, form)
        last = _mean(history[-window:], name, form)
        rows.add_row(label, first, last)
    console().print(rows)
    evaluated = [row for row in history if row.get("eval_reward") is not None]
    if evaluated:
        from rl.training.checkpoint import BEST

        last = evaluated[-1]
        typer.echo(
            f"best evaluation: reward {last['eval_best_reward']:.3f} at step {last['eval_best_step']}, "
            f"kept in {run.output / BEST}"
        )
    typer.echo(f"metrics and checkpoints in {run.output}; next: {_evaluation_command(run)}")


def _evaluation_command(run: Run) -> str:
    """Return the command that evaluates the run; eval takes the chain task and the task's shipped model by default."""
    import shlex

    from rl.policy.shipped_models import default_model

    words = ["flowgraph-rl", "eval"]
    if run.task != "chain":
        words += ["--task", run.task]
    for name, value in run.task_options.items():
        words += ["--task-option", f"{name}={value}"]
    if run.model != default_model(run.task):
        words += ["--model", run.model]
    return shlex.join([*words, "--adapter", str(run.output)])


def _mean(rows: list[dict[str, Any]], name: str, form: str) -> str:
    """Format the mean of a figure over steps; a step in which every response was cut off may lack it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return "-"
    return format(sum(values) / len(values), form)
