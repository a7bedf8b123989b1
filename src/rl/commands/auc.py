"""``flowgraph-rl auc``: test whether credit rules rank used work above unused work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowgraph import MissingExtraError
from rl.commands.options import Adapter, Device, Dtype, TaskModel, TaskName, TaskOption, make_folder
from rl.commands.terminal import console, spinner, table

if TYPE_CHECKING:
    from rl.alignment.credit_auc import CreditAuc

_LEAST_AUC = 0.7
"""Below this AUC against detours, a rule is no basis for credit."""


def auc_command(
    task: TaskName = "chain",
    task_option: TaskOption = None,
    model: TaskModel = None,
    rules: Annotated[
        str, typer.Option("--rules", help="RULE[:SHAPE][:NAME=VALUE,...], separated by commas.")
    ] = "uniform,entropy,max_attention,flow",
    problems: Annotated[int, typer.Option("--problems", "-n", help="Problems; each has group_size responses.")] = 64,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Measure every rule on many graphs and name the best.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="NAME=VALUE of PPOConfig, such as group_size=8; may be repeated."),
    ] = None,
    adapter: Adapter = None,
    seed: Annotated[int, typer.Option(help="Seed of rollouts, bootstrap and rules that draw random numbers.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for auc.json and auc.png.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Test whether credit rules rank tokens that feed the answer above unused work; nothing is trained."""
    from rl.alignment.arms import named_arms, split_arms
    from rl.commands.rollout_settings import rollout_config
    from rl.commands.run_file import optional_policy_folder, parse_options
    from rl.policy.shipped_models import default_model

    # Check the input before the model is loaded: a misspelt rule ends here.
    chosen = split_arms(rules)
    named_arms(chosen)
    if out is not None:
        make_folder(out)
    model = model or default_model(task)
    config = rollout_config(model, {"num_prompts": 32, "micro_batch_size": 128}, settings or [])
    options = parse_options(task_option or [], flag="--task-option")
    folder = optional_policy_folder(adapter)

    with spinner() as progress:
        progress(f"loading {model}")
        # torch and transformers are imported under the spinner.
        from rl.alignment.credit_auc import credit_auc
        from rl.policy.loading import load_policy
        from rl.tasks.registry import make_task

        network, tokenizer = load_policy(model, dtype, device, folder)
        found = credit_auc(
            network,
            tokenizer,
            make_task(task, **options),
            rules=chosen,
            config=config,
            num_problems=problems,
            sweep=sweep,
            seed=seed,
            progress=lambda done, total: progress(f"{done}/{total} problems"),
        )
    print_auc(found)
    if out is not None:
        _write(found, out)


def print_auc(found: CreditAuc) -> None:
    """Print AUC and weights of every rule as tables, and the size of the run."""
    screen = console()
    # The highest first; of a sweep only the head is shown.
    ranked = sorted(found.rules, key=lambda row: -1.0 if row.auc is None else row.auc, reverse=True)
    shown = ranked if found.best is None else ranked[:12]

    screen.print("AUC of decisive tokens against detours, and against all other tokens", highlight=False)
    rows = table("rule", "detours", "95 %", "n", "others", "95 %", figures=True)
    for row in shown:
        rows.add_row(
            row.rule,
            _number(row.auc),
            _interval(row.low, row.high),
            str(row.n),
            _number(row.auc_others),
            _interval(row.low_others, row.high_others),
        )
    screen.print(rows)

    figures = ("end token", "opener", "Gini", "effective", "unanchored")
    screen.print(
        "weights: mean of the end token and of the token in front of the answer, Gini coefficient, effective share, "
        "and share of the failures whose answer is tied to nothing",
        highlight=False,
    )
    # The weights of the arm's shape: a rule may rank well and still starve the end token.
    weights = table("rule", *figures, figures=True)
    for row in shown:
        weights.add_row(
            row.rule,
            _number(row.end_weight),
            _number(row.opener_weight),
            _number(row.gini),
            _number(row.effective_tokens),
            _number(row.unanchored_failures),
        )
    screen.print(weights)

    # What the figures rest on.
    screen.print(
        f"{found.num_responses} responses to {found.num_problems} problems, {found.num_unanswered} without an answer, "
        f"mean reward {found.reward:.3f}, {found.response_tokens:.1f} tokens a response",
        highlight=False,
    )
    if found.best is not None:
        best = found.best
        screen.print(
            f"best of {best.num_graphs} graphs: {best.rule}, AUC {_number(best.auc)} "
            f"({_interval(best.low, best.high)}) on the problems that did not choose it",
            highlight=False,
        )
    # The oracle is right by definition, and uniform knows nothing by definition.
    weak = [row.rule for row in shown if row.auc is not None and row.auc < _LEAST_AUC and row.rule != "uniform"]
    if weak and found.best is None:
        screen.print(
            f"below {_LEAST_AUC} against detours, no basis for credit on this task: {', '.join(weak)}",
            style="yellow",
            highlight=False,
        )


def _number(value: float | None) -> str:
    """Format a figure; a dash where it is not defined."""
    return "-" if value is None else f"{value:.2f}"


def _interval(low: float | None, high: float | None) -> str:
    """Format an interval; a dash where there is none."""
    if low is None or high is None:
        return "-"
    return f"{low:.2f} to {high:.2f}"


def _write(found: CreditAuc, folder: Path) -> None:
    """Write the rows, and the picture where matplotlib is installed."""
    from rl.alignment.auc_plot import plot_auc

    found.to_json(folder / "auc.json")
    typer.echo(f"wrote {folder / 'auc.json'}")
    try:
        picture = plot_auc(found, folder / "auc.png")
    except MissingExtraError as error:
        typer.echo(f"no picture: {error}", err=True)
    else:
        typer.echo(f"wrote {picture}")
