"""``flowgraph-rl eval``: measure a policy on fresh problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph import atomic_write
from rl.commands.options import Adapter, Device, Dtype, Quantize, TaskModel, TaskName, TaskOption
from rl.commands.terminal import console, spinner, table
from rl.errors import ConfigError

if TYPE_CHECKING:
    from rl.evaluation.evaluate import Evaluation


def evaluate_command(
    model: TaskModel = None,
    task: TaskName = "chain",
    task_option: TaskOption = None,
    adapter: Adapter = None,
    num_problems: Annotated[int, typer.Option("-n", "--num-problems", help="Fresh problems.")] = 200,
    samples: Annotated[int, typer.Option("-k", "--samples", help="Responses to each problem.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy decoding.")] = 0.0,
    max_response_tokens: Annotated[
        int | None, typer.Option(help="Responses are cut off there. Default: 256; 48 to 128 for shipped models.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Responses at a time.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    stop_string: Annotated[list[str] | None, typer.Option(help="A text that ends a response; may be repeated.")] = None,
    template_option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for the chat template, such as enable_thinking=false; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write every response here, as JSON lines.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Measure a policy on fresh problems: mean reward with a 95 % interval."""
    from rl.commands.run_file import optional_policy_folder, parse_options
    from rl.policy.shipped_models import SHIPPED_MODELS, default_model

    # Check the input before the model is loaded, which takes seconds.
    options = parse_options(task_option or [], flag="--task-option")
    template_options = parse_options(template_option or [], flag="--template-option")
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"out: its folder must exist, got {out}; make it first")
    folder = optional_policy_folder(adapter)
    if model is None:
        model = default_model(task)
    if max_response_tokens is None:
        shipped = SHIPPED_MODELS.get(model)
        max_response_tokens = 256 if shipped is None else shipped.max_response_tokens

    with spinner() as progress:
        progress(f"loading {model}")
        # torch and transformers are imported under the spinner.
        from rl.evaluation.evaluate import evaluate
        from rl.policy.loading import load_policy
        from rl.tasks.registry import make_task

        network, tokenizer = load_policy(model, dtype, device, folder, quantize=quantize)
        result = evaluate(
            network,
            tokenizer,
            make_task(task, **options),
            num_problems=num_problems,
            samples=samples,
            temperature=temperature,
            max_response_tokens=max_response_tokens,
            batch_size=batch_size,
            seed=seed,
            stop_strings=stop_string or [],
            chat_template_kwargs=template_options,
            progress=lambda done, total: progress(f"{done}/{total} responses"),
        )

    if out is not None:
        lines = [json.dumps(row) + "\n" for row in result.responses]
        with atomic_write(out) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    if json_output:
        typer.echo(json.dumps(result.summary()))
    else:
        _print_evaluation(result, samples)


def _print_evaluation(result: Evaluation, samples: int) -> None:
    """Print the figures of an evaluation as a table."""
    rows = table("figure", "value")
    rows.add_row("mean reward", f"{result.reward:.3f}  (95 %: {result.low:.3f} to {result.high:.3f})")
    if samples > 1:
        rows.add_row(f"best of {samples}", f"{result.best_of:.3f}")
    rows.add_row("problems", f"{result.num_problems}")
    rows.add_row("with an answer", f"{result.answer_share:.1%}")
    rows.add_row("cut off", f"{result.truncated_share:.1%}")
    rows.add_row("tokens a response", f"{result.response_tokens:.1f}")
    console().print(rows)
