"""``flowgraph-rl train``: train a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flowgraph import atomic_write
from rl.commands.options import Device, Dtype, TaskOption
from rl.commands.terminal import console, spinner, table


def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="A YAML file: any setting of PPOConfig, and model, task, task_options, output.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A model name, a folder, or 'chain'. Default: chain.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="As for eval. Default: chain.")] = None,
    task_option: TaskOption = None,
    credit: Annotated[
        str | None, typer.Option("--credit", "-c", help="A credit rule; `flowgraph-rl rules` lists them.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Rollout-and-update steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="NAME=VALUE for any setting, such as credit.strength=2; may be repeated."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="A PEFT LoRA folder to go on from.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run. Default: runs/TASK-RULE.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in the folder.")
    ] = False,
    allow_changes: Annotated[bool, typer.Option("--allow-changes", help="Resume although settings differ.")] = False,
    tracker: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb or trackio; may be repeated.")] = None,
    show_settings: Annotated[
        bool, typer.Option("--show-settings", help="Print all settings as YAML and stop.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Train a policy; writes metrics.jsonl, checkpoints and rollouts into a folder."""
    from rl.commands.run_file import policy_folder, read_run

    flags = {
        "model": model,
        "task": task,
        "steps": steps,
        "seed": seed,
        "output": None if output is None else str(output),
    }
    run = read_run(config, flags, credit=credit, settings=settings or [], task_options=task_option or [])
    if show_settings:
        typer.echo(run.to_yaml(), nl=False)
        return
    from rl.training.tracking import check_trackers

    check_trackers(tracker or [])
    with spinner() as progress:
        progress(f"loading {run.model}")
        from rl.policy.loading import load_policy

        network, tokenizer = load_policy(run.model, dtype, device, None if adapter is None else policy_folder(adapter))
        from rl.tasks.registry import make_task
        from rl.training.distributed import make_accelerator
        from rl.training.trainer import PPOTrainer

        trainer = PPOTrainer(
            network, tokenizer, task=make_task(run.task, **run.task_options), config=run.config, output=run.output,
            resume=resume, allow_changes=allow_changes, trackers=tracker or (),
            accelerator=make_accelerator(run.output, tracker or (), device),
        )  # fmt: skip
    if trainer.accelerator.is_main_process:
        with atomic_write(run.output / "run.yaml") as temporary:
            temporary.write_text(run.to_yaml(), encoding="utf-8")
        if trainer.accelerator.num_processes > 1:  # a launcher that started one alone says nothing either
            typer.echo(f"{trainer.accelerator.num_processes} processes share the work", err=True)
        if trainer.position.step:
            typer.echo(f"resumed after step {trainer.position.step}", err=True)
    history = trainer.train()
    if trainer.accelerator.is_main_process:
        _summary(history, run.output)


def _summary(history: list[dict[str, Any]], output: Path) -> None:
    def mean(rows: list[dict[str, Any]], name: str, form: str) -> str:
        values = [row[name] for row in rows if row.get(name) is not None]  # nothing is learned where all were cut off
        return form.format(sum(values) / len(values)) if values else "-"

    window = max(1, len(history) // 10)
    rows = table("figure", f"first {window} steps", f"last {window} steps")
    for label, name, form in (
        ("reward", "reward", "{:.3f}"), ("entropy", "entropy", "{:.3f}"),
        ("tokens a response", "response_tokens", "{:.1f}"),
        ("seconds a step", "seconds", "{:.2f}"), ("credit overhead, %", "credit_overhead_percent", "{:.1f}"),
    ):  # fmt: skip
        rows.add_row(label, mean(history[:window], name, form), mean(history[-window:], name, form))
    console().print(rows)
    typer.echo(f"metrics and checkpoints in {output}; next: flowgraph-rl eval --adapter {output}")
