"""``flowgraph-rl credit-bench``: score credit rules against Monte Carlo advantages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rl.commands.options import Adapter, Device, Dtype, TaskModel, TaskName, TaskOption, make_folder
from rl.commands.terminal import console, spinner, table

if TYPE_CHECKING:
    from rl.alignment.credit_bench import CreditBench, Figure

_DEFAULT_RULES = "random:soft,entropy:soft,max_attention:soft,flow:soft,flow"


def credit_bench_command(
    task: TaskName = "chain",
    task_option: TaskOption = None,
    model: TaskModel = None,
    rules: Annotated[
        str,
        typer.Option("--rules", help="RULE[:SHAPE][:NAME=VALUE,...], separated by commas; uniform is always scored."),
    ] = _DEFAULT_RULES,
    problems: Annotated[int, typer.Option("--problems", "-n", help="Problems; each has group_size responses.")] = 32,
    rollouts: Annotated[int, typer.Option("--rollouts", "-k", help="Rollouts from each prefix, an even number.")] = 16,
    per: Annotated[str, typer.Option("--per", help="'token' or 'step': what gets an advantage of its own.")] = "token",
    step_end: Annotated[
        str | None,
        typer.Option("--step-end", help="With --per step: a regular expression of the text that ends a step."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="NAME=VALUE of PPOConfig, such as group_size=4; may be repeated."),
    ] = None,
    adapter: Adapter = None,
    seed: Annotated[int, typer.Option(help="Seed of rollouts, bootstrap and adapter.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for credit_bench.json and values.jsonl; a stopped run goes on there."),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Score credit rules against the true advantages of tokens, estimated by rollouts; nothing is trained."""
    from rl.alignment.arms import named_arms, split_arms
    from rl.commands.rollout_settings import rollout_config
    from rl.commands.run_file import optional_policy_folder, parse_options
    from rl.policy.shipped_models import default_model

    # Check the input before the model is loaded: a misspelt rule ends here.
    chosen = split_arms(rules)
    named_arms(chosen)
    pattern = _step_pattern(per, step_end)
    if out is not None:
        make_folder(out)
    model = model or default_model(task)
    config = rollout_config(model, {"group_size": 2, "micro_batch_size": 64}, settings or [])
    options = parse_options(task_option or [], flag="--task-option")
    folder = optional_policy_folder(adapter)

    with spinner() as progress:
        progress(f"loading {model}")
        # torch and transformers are imported under the spinner.
        from rl.alignment.credit_bench import credit_bench
        from rl.policy.loading import load_policy
        from rl.tasks.registry import make_task

        network, tokenizer = load_policy(model, dtype, device, folder)
        found = credit_bench(
            network,
            tokenizer,
            make_task(task, **options),
            rules=chosen,
            config=config,
            num_problems=problems,
            num_rollouts=rollouts,
            step_end=pattern,
            path=None if out is None else out / "values.jsonl",
            seed=seed,
            progress=lambda done, total: progress(f"{done}/{total} problems"),
        )
    print_credit_bench(found)
    if out is not None:
        found.to_json(out / "credit_bench.json")
        typer.echo(f"wrote {out / 'credit_bench.json'}")


def print_credit_bench(found: CreditBench) -> None:
    """Print the scores of every rule as a table, the size of the run, and whether the truth stands out of its noise."""
    screen = console()
    in_top = f"in top {found.share:.0%}"
    rows = table("rule", "rank", "corrected", "AUC", in_top, "cosine", "minus uniform", figures=True)
    for row in found.rules:
        rows.add_row(
            row.rule,
            _figure(row.rank),
            "-" if row.rank_corrected is None else f"{row.rank_corrected:.2f}",
            _figure(row.auc),
            _figure(row.top_share),
            _figure(row.cosine),
            _figure(row.cosine_gain),
        )
    screen.print(rows)
    # The truth is an estimate, so its quality belongs beside the scores.
    reliability = "-" if found.reliability is None else f"{found.reliability:.2f}"
    screen.print(
        f"{found.num_responses} responses to {found.num_problems} problems, {found.num_units} advantages per "
        f"{found.per} from {found.num_rollouts} rollouts each, mean reward {found.reward:.3f}; reliability of "
        f"|advantage| {reliability}, share of the squared advantage that is no noise {_figure(found.signal)}",
        highlight=False,
    )
    if not found.is_reliable:
        screen.print(
            "rollouts: must be enough to tell the advantages from their noise, got too few for these problems; take "
            "more rollouts (-k) or more problems (-n)",
            style="yellow",
            highlight=False,
        )


def _figure(figure: Figure) -> str:
    """Format a figure with its interval; a dash where it is not defined."""
    if figure.value is None:
        return "-"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.2f}"
    return f"{figure.value:.2f} ({figure.low:.2f} to {figure.high:.2f})"


def _step_pattern(per: str, step_end: str | None) -> str | None:
    """Return the pattern that ends a step; None where every token is a unit.

    Raises:
        ConfigError: an unknown unit, a pattern for tokens, or one that does not compile.
    """
    import re

    from rl.alignment.monte_carlo import STEP_END
    from rl.errors import ConfigError

    if per not in ("token", "step"):
        raise ConfigError(f"--per: must be 'token' or 'step', got {per!r}; choose one of them")
    if per == "token":
        if step_end is not None:
            raise ConfigError(f"--step-end: must come with --per step, got {step_end!r} with tokens; add --per step")
        return None
    if step_end is None:
        return STEP_END
    try:
        re.compile(step_end)
    except re.error as error:
        raise ConfigError(
            f"--step-end: must be a regular expression, got {step_end!r} ({error}); escape special characters"
        ) from error
    return step_end
