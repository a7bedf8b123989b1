"""The command line: ``flowgraph-rl train | eval | report | rules | merge | pretrain | align``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flowgraph import FlowgraphError, atomic_write
from rl.commands.align import align_command
from rl.commands.terminal import console, spinner, table
from rl.errors import ConfigError

app = typer.Typer(
    name="flowgraph-rl",
    help="Train LoRA policies with PPO and token credit shaped by reasoning flow.",
    epilog="Exit codes: 0 done, 1 something broke, 2 bad input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Option("--model", "-m", help="A model name, a folder, or 'chain' for the small model that is shipped.")
]
TaskName = Annotated[
    str,
    typer.Option(
        "--task", "-t", help="'chain', 'countdown', 'gsm_symbolic', 'chain_sum', 'reasoning_gym:NAME' or a .jsonl file."
    ),
]
TaskOption = Annotated[
    list[str] | None, typer.Option("--task-option", help="NAME=VALUE, such as hops=[2,4]; may be repeated.")
]
Device = Annotated[str | None, typer.Option(help="'cpu', 'cuda', 'cuda:1', 'mps'. Default: as accelerate finds it.")]
Dtype = Annotated[str, typer.Option(help="'auto', 'float32', 'bfloat16' or 'float16', of the frozen base.")]


def main() -> None:
    """Run the command line; bad input ends with its message and exit code 2, never a stack trace."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except FlowgraphError as error:
        typer.secho(f"flowgraph-rl: {error}", err=True, fg=typer.colors.RED)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # how typer reports an interrupt
            typer.secho("flowgraph-rl: stopped; `train --resume` goes on from the newest checkpoint", err=True)
        raise


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"flowgraph-rl {version('flowgraph-llm')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
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
    with spinner() as say:
        say(f"loading {run.model}")
        from rl.policy.loading import load_policy

        network, tokenizer = load_policy(run.model, dtype, device, None if adapter is None else policy_folder(adapter))
        from rl.tasks import make_task
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


@app.command("eval")
def evaluate_command(
    model: Model = "chain",
    task: TaskName = "chain",
    task_option: TaskOption = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", "-a", help="A run, a checkpoint, or a PEFT folder.")
    ] = None,
    num_problems: Annotated[int, typer.Option("-n", "--num-problems", help="Fresh problems.")] = 200,
    samples: Annotated[int, typer.Option("-k", "--samples", help="Responses to each problem.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy decoding.")] = 0.0,
    max_response_tokens: Annotated[
        int | None, typer.Option(help="Responses are cut off there. Default: 256; 48 for the shipped model.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Responses at a time.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write every response here, as JSON lines.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Measure a policy on fresh problems: mean reward with a 95 % interval."""
    from rl.commands.run_file import CHAIN_DEFAULTS, parse_options, policy_folder
    from rl.policy.loading import load_policy

    options = parse_options(task_option or [], flag="--task-option")
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"out: its folder must exist, got {out}; make it first")
    folder = None if adapter is None else policy_folder(adapter)
    limit = max_response_tokens
    if limit is None:
        limit = int(CHAIN_DEFAULTS["max_response_tokens"]) if model == "chain" else 256
    with spinner() as say:
        say(f"loading {model}")
        network, tokenizer = load_policy(model, dtype, device, folder)
        from rl.evaluation.evaluate import evaluate
        from rl.tasks import make_task

        result = evaluate(
            network, tokenizer, make_task(task, **options), num_problems=num_problems, samples=samples,
            temperature=temperature, max_response_tokens=limit, batch_size=batch_size, seed=seed,
            progress=lambda done, total: say(f"{done}/{total} responses"),
        )  # fmt: skip
    if out is not None:
        with atomic_write(out) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in result.responses), encoding="utf-8")
    if json_output:
        typer.echo(json.dumps(result.summary()))
        return
    rows = table("figure", "value")
    rows.add_row("mean reward", f"{result.reward:.3f}  (95 %: {result.low:.3f} to {result.high:.3f})")
    if samples > 1:
        rows.add_row(f"best of {samples}", f"{result.best_of:.3f}")
    rows.add_row("problems", f"{result.num_problems}")
    rows.add_row("with an answer", f"{result.answer_share:.1%}")
    rows.add_row("cut off", f"{result.truncated_share:.1%}")
    rows.add_row("tokens a response", f"{result.response_tokens:.1f}")
    console().print(rows)


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="A run, or a rollout file of one (rollouts/step-....safetensors).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Make the token-credit page of a rollout: what each token was worth, right answers beside wrong ones."""
    from rl.commands.run_file import newest_rollout
    from rl.reports.credit_report import report_file

    path = report_file(newest_rollout(source), out)
    typer.echo(f"wrote {path}")
    if open_page:
        typer.launch(str(path))


@app.command("pretrain")
def pretrain_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new model.")],
    task: Annotated[str, typer.Option("--task", "-t", help="Only 'chain' has demonstrations to learn from.")] = "chain",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="NAME=VALUE of the recipe, such as steps=300 or width=64; may be repeated."),
    ] = None,
) -> None:
    """Train a small base model from scratch: the one that is shipped, or your own variant of it."""
    from rl.commands.run_file import parse_options

    if task != "chain":
        raise ConfigError(f"task: must be 'chain', got {task!r}; other tasks have no demonstrations, so bring a model")
    options = parse_options(settings or [])
    with spinner() as say:
        say("loading torch")
        from dataclasses import fields

        from rl.chain_model.pretrain import Recipe, pretrain

        names = [item.name for item in fields(Recipe)]
        for name in options:
            if name not in names:
                raise ConfigError(
                    f"--set: must name a setting of the recipe, got {name!r}; there are {', '.join(names)}"
                )
        recipe = Recipe(**options)
        report = pretrain(
            out, recipe, progress=lambda step, loss: say(f"update {step}/{recipe.steps}, loss {loss:.3f}")
        )
    sampled, greedy = report["measured"]["sampled"]["all"], report["measured"]["greedy"]["all"]
    typer.echo(
        f"wrote {out}: {report['num_parameters']:,} parameters, right on {sampled['share']:.1%} of {sampled['n']} "
        f"fresh problems when sampled, on {greedy['share']:.1%} greedily; next: flowgraph-rl train --model {out}"
    )


@app.command()
def rules() -> None:
    """List the credit rules."""
    from rl.credit.registry import find_rule, rule_names

    rows = table("rule", "reads", "scores")
    for name in rule_names():
        rule = find_rule(name)
        needs = (
            ["attention"] * bool(rule.needs)
            + ["a backward pass"] * rule.gradient
            + ["ground truth"] * rule.needs_oracle
        )
        rows.add_row(name, ", ".join(needs) or "-", rule.summary)
    console().print(rows)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="A run, a checkpoint, or a PEFT folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the merged model.")],
    model: Model = "chain",
    dtype: Dtype = "auto",
) -> None:
    """Merge a trained adapter into its base; plain transformers loads the result."""
    from rl.commands.run_file import policy_folder
    from rl.folders import new_folder
    from rl.policy.loading import load_policy

    if out.exists():
        raise ConfigError(f"out: must be a new folder, got {out}, which exists; choose another name")
    with spinner() as say:
        say(f"loading {model}")
        network, tokenizer = load_policy(model, dtype, None, policy_folder(adapter))
        say("merging")
        merged = network.merge_and_unload()
        with new_folder(out) as temporary:
            merged.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    typer.echo(f"wrote {out}")


app.command("align")(align_command)


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


if __name__ == "__main__":  # `accelerate launch -m rl.cli`
    main()
