"""``flowgraph-rl report`` and ``rules``: the token-credit page of a rollout, and the list of credit rules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rl.commands.terminal import console, table

if TYPE_CHECKING:
    from rl.records import Credit


def report(
    source: Annotated[Path, typer.Argument(help="A run, or a rollout file of one (rollouts/step-....safetensors).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    rules: Annotated[
        str | None,
        typer.Option("--rules", help="Show what these rules would mark too: RULE[:SHAPE][:NAME=VALUE,...], ..."),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Make the token-credit page of a rollout: the credit of each token, right answers beside wrong ones."""
    from rl.commands.run_file import newest_rollout
    from rl.reports.credit_report import report_file

    rollout = newest_rollout(source)
    others = None if rules is None else _other_credit(rollout, rules)
    path = report_file(rollout, out, others=others)
    typer.echo(f"wrote {path}")
    if open_page:
        typer.launch(str(path))


def _other_credit(rollout: Path, rules: str) -> dict[str, Credit]:
    """Score a rollout under other rules, by the newest policy of its run.

    Raises:
        CreditError, ConfigError: a rule that is unknown, or given twice.
        CheckpointError: the file is no rollout, or does not lie in a run with a checkpoint.
    """
    from rl.alignment.arms import named_arms, split_arms
    from rl.commands.run_file import policy_folder
    from rl.config import LoraConfig
    from rl.credit.scoring import score_with_settings
    from rl.policy.actor_critic import ActorCritic
    from rl.policy.loading import load_policy
    from rl.rollouts.rollout_file import load_rollout

    # The rules are checked before the model is loaded.
    arms = named_arms(split_arms(rules))
    loaded = load_rollout(rollout)
    # A run keeps its rollouts in a folder of their own.
    folder = policy_folder(rollout.parent.parent)
    model, _ = load_policy(loaded.info["model"], "auto", None, folder)
    policy = ActorCritic(model, LoraConfig(), critic=False)
    # Seed and step are those of the run, so that rules that draw give what they would have given there.
    scored = score_with_settings(
        policy,
        loaded.experience.responses,
        list(arms.values()),
        temperature=loaded.info["temperature"],
        micro_batch_size=loaded.info["micro_batch_size"],
        seed=loaded.info["seed"],
        step=loaded.info["step"],
        reference=False,
    )
    return dict(zip(arms, scored.credits, strict=True))


def rules() -> None:
    """List the credit rules, and the recommended setting."""
    from rl.alignment.arms import arm_name
    from rl.config import CreditConfig
    from rl.credit.registry import find_rule, rule_names

    rows = table("rule", "reads", "scores")
    for name in rule_names():
        rule = find_rule(name)
        reads = []
        if rule.needs:
            reads.append("attention")
        if rule.own_pass:
            reads.append(rule.own_pass)
        if rule.needs_oracle:
            reads.append("ground truth")
        rows.add_row(name, ", ".join(reads) or "-", rule.summary)
    console().print(rows)
    # Text of the settings of one arm, as align and train take them.
    recommended = arm_name(CreditConfig.recommended())
    typer.echo(f"recommended: {recommended} (benchmarks/configs/recommended.yaml; docs/credit.md says why)")
