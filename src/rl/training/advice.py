"""Recognise a run that cannot learn from its first steps, and name the settings to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rl.config import PPOConfig

FIRST_STEPS = 5
"""Steps after which a run is checked, or its last step where it has fewer."""
_MANY = 0.5
"""Share of truncated responses from which the token limit is named as the likely reason."""


def learning_warning(rows: Sequence[Mapping[str, Any]], config: PPOConfig) -> str | None:
    """Explain why a run has not learned anything in its first steps and what to change; None where it could learn.

    An update has a gradient only where rewards differ: within a group for estimators that compare the responses to one
    problem, anywhere for a critic. Credit by flow has an effect only where responses state an answer.

    Args:
        rows: of the first steps, see :func:`rl.training.metrics.step_row`.
        config: of the run.
    """
    # Metrics that an earlier version of this package wrote lack the range of the rewards.
    if not rows or any("reward_min" not in row for row in rows):
        return None

    # The figures of all first steps together.
    num_responses = len(rows) * config.num_prompts * config.group_size
    scope = f"all {num_responses} responses of the first {len(rows)} steps"
    if len(rows) == 1:
        scope = f"all {num_responses} responses of the only step"
    has_no_answer = all(row["answer_share"] == 0 for row in rows)
    lowest = min(row["reward_min"] for row in rows)
    highest = max(row["reward_max"] for row in rows)

    # A penalty for truncated responses makes a difference where only some of them are truncated.
    is_penalised = config.missing_eos_penalty > 0 and any(0 < row["truncated_share"] < 1 for row in rows)
    is_constant = lowest == highest and not is_penalised
    is_constant_in_groups = all(row["zero_variance_share"] == 1 for row in rows)
    if is_constant or (is_constant_in_groups and not config.has_critic):
        return _equal_rewards(rows, config, scope, has_no_answer=has_no_answer, lowest=lowest, highest=highest)

    # Rewards differ, so the run learns; but credit that needs an answer changes nothing.
    credit = config.credit
    raises_weights = credit.shape in ("top_q", "soft") and credit.strength > 1 and credit.rule != "uniform"
    has_no_effect = all(row.get("raised_share", 0) == 0 for row in rows)
    if has_no_answer and raises_weights and has_no_effect:
        return (
            f"credit: rule {credit.rule!r} must find stated answers to weigh tokens, got none in {scope}, so every "
            f"weight is 1; {_state_answers(rows, config)}"
        )
    return None


def _equal_rewards(
    rows: Sequence[Mapping[str, Any]],
    config: PPOConfig,
    scope: str,
    *,
    has_no_answer: bool,
    lowest: float,
    highest: float,
) -> str:
    """Describe a run whose rewards do not differ."""
    found = f"reward {lowest:g} for {scope}"
    if lowest != highest:
        found = f"no difference between the responses to any problem in {scope}"
    rule = "reward: must differ between responses to teach anything"
    if has_no_answer:
        return f"{rule}, got {found}, and no response states an answer; {_state_answers(rows, config)}"
    if lowest == highest == 1:
        return f"{rule}, got {found}; give the task harder problems"
    return (
        f"{rule}, got {found}; give the task easier problems, reward partial success, or raise group_size "
        f"({config.group_size}) or temperature ({config.temperature:g})"
    )


def _state_answers(rows: Sequence[Mapping[str, Any]], config: PPOConfig) -> str:
    """Name the remedies for responses that state no answer."""
    remedy = (
        "show the model in the prompt how to state its answer (such as \\boxed{7}, <answer>7</answer> or #### 7), or "
        "give the task the pattern of its answers"
    )
    truncated = sum(row["truncated_share"] for row in rows) / len(rows)
    if truncated >= _MANY:
        remedy += (
            f"; {truncated:.0%} of the responses were cut off: raise max_response_tokens={config.max_response_tokens}"
        )
    return remedy
