"""``flowgraph-rl report`` and ``rules``: the token-credit page of a rollout, and the list of credit rules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rl.commands.terminal import console, table


def report(
    source: Annotated[Path, typer.Argument(help="A run, or a rollout file of one (rollouts/step-....safetensors).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Make the token-credit page of a rollout: the credit of each token, right answers beside wrong ones."""
    from rl.commands.run_file import newest_rollout
    from rl.reports.credit_report import report_file

    path = report_file(newest_rollout(source), out)
    typer.echo(f"wrote {path}")
    if open_page:
        typer.launch(str(path))


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
