"""Write the arms of a comparison as short texts, and compute the credit of all arms on one batch.

An *arm* is one credit setting: rule, shape and parameters. Its text is ``RULE[:SHAPE][:NAME=VALUE,...]``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

from jaxtyping import Bool
from torch import Tensor

from rl.config import CreditConfig, PPOConfig, Shape
from rl.credit.ratings import check_credit
from rl.credit.registry import POSITION_MATCHED, applied, find_rule
from rl.credit.scoring import score_with_settings
from rl.credit.weights import top_share
from rl.errors import ConfigError
from rl.policy.actor_critic import ActorCritic
from rl.records import Credit, Responses, TokenScores

_OPTION = "options."
"""Prefix of a setting that belongs to the rule itself."""

_TEXT_SETTINGS = ("layers", "heads")
"""Settings whose values are always text: ``layers=3`` means the text "3"."""


def parse_arm(text: str) -> CreditConfig:
    """Read credit settings from ``RULE[:SHAPE][:NAME=VALUE,...]``, such as ``flow:top_q:share=0.2,strength=3``.

    Settings are those of :class:`rl.CreditConfig`; ``options.NAME`` is a setting of the rule itself.

    Raises:
        ConfigError: a part that is neither a shape nor a setting, or a value that breaks a rule.
        CreditError: an unknown rule.

    Example:
        >>> parse_arm("entropy:only_top:share=0.2").shape
        'only_top'
    """
    rule, *rest = [part.strip() for part in text.split(":")]
    find_rule(rule)

    shapes = get_args(Shape)
    names = [item.name for item in fields(CreditConfig) if item.name not in ("rule", "options")]
    settings: dict[str, Any] = {"rule": rule}
    options: dict[str, Any] = {}
    # Colons and commas separate alike; a part without "=" is a shape, every other part a setting.
    parts = ",".join(rest).split(",") if rest else []
    for part in parts:
        part = part.strip()
        name, sign, value = [side.strip() for side in part.partition("=")]
        has_value = sign != ""
        if not has_value and name in shapes:
            settings["shape"] = name
        elif has_value and name.startswith(_OPTION) and name != _OPTION:
            options[name.removeprefix(_OPTION)] = _read_value(value)
        elif has_value and name in _TEXT_SETTINGS:
            settings[name] = value
        elif has_value and name in names:
            settings[name] = _read_value(value)
        else:
            raise ConfigError(
                f"arms: {text!r} must be RULE:SHAPE:NAME=VALUE,NAME=VALUE, got {part!r} in it; shapes are "
                f"{', '.join(shapes)}, and settings {', '.join(names)} and options.NAME"
            )
    if options:
        settings["options"] = options
    return CreditConfig(**settings)


def split_arms(text: str) -> list[str]:
    """Split a comma-separated text into arms; a piece that is only a setting belongs to the arm before it.

    Example:
        >>> split_arms("uniform,flow:top_q:share=0.2,strength=3,entropy")
        ['uniform', 'flow:top_q:share=0.2,strength=3', 'entropy']
    """
    arms: list[str] = []
    for piece in text.split(","):
        piece = piece.strip()
        # A rule comes before a colon, so a piece whose "=" comes before any colon names no rule.
        before_sign = piece.partition("=")[0]
        is_setting = "=" in piece and ":" not in before_sign
        if arms and is_setting:
            arms[-1] += f",{piece}"
        elif piece:
            arms.append(piece)
    return arms


def arm_name(credit: CreditConfig) -> str:
    """Return the shortest text from which :func:`parse_arm` makes these settings.

    Example:
        >>> arm_name(parse_arm("flow:top_q:strength=1.5,share=0.2"))
        'flow:share=0.2'
    """
    default = CreditConfig(rule=credit.rule)
    parts = [credit.rule]
    if credit.shape != default.shape:
        parts.append(credit.shape)

    # Only settings that differ from the defaults are named.
    changed = []
    for item in fields(credit):
        # These three have forms of their own.
        if item.name in ("rule", "shape", "options"):
            continue
        value = getattr(credit, item.name)
        if value != getattr(default, item.name):
            changed.append(f"{item.name}={_write_value(value)}")
    for name, value in credit.options.items():
        changed.append(f"{_OPTION}{name}={_write_value(value)}")
    if changed:
        parts.append(",".join(changed))
    return ":".join(parts)


def named_arms(arms: Sequence[str | CreditConfig]) -> dict[str, CreditConfig]:
    """Return the settings of all arms by name, in the given order.

    Raises:
        ConfigError: the same settings twice, or something that is neither text nor settings.
        CreditError: an unknown rule.
    """
    named: dict[str, CreditConfig] = {}
    for arm in arms:
        if not isinstance(arm, (str, CreditConfig)):
            raise ConfigError(f"arms: must be texts or CreditConfig, got {type(arm).__name__}; write 'flow:soft'")
        credit = parse_arm(arm) if isinstance(arm, str) else arm
        check_credit(credit)
        name = arm_name(credit)
        if name in named:
            raise ConfigError(f"arms: must differ, got {name!r} twice; leave one of them out")
        named[name] = credit
    return named


def score_arms(
    policy: ActorCritic, responses: Responses, arms: Sequence[CreditConfig], config: PPOConfig, *, step: int
) -> tuple[TokenScores, list[Credit]]:
    """Compute the scores of every response token and the credit of every arm from one shared forward pass.

    Args:
        policy: the policy whose gradient is measured.
        responses: on the CPU, as the results are.
        arms: credit settings.
        config: temperature, micro-batches, KL and seed.
        step: number of the batch, part of the seed of rules that draw random numbers.

    Returns:
        The scores, and the credit of each arm, in order.

    Cost: one forward pass; one more for a KL in the reward, and one forward and backward pass for each arm whose rule
    is registered with ``gradient=True``.
    """
    scored = score_with_settings(
        policy,
        responses,
        arms,
        temperature=config.temperature,
        micro_batch_size=config.micro_batch_size,
        seed=config.seed,
        step=step,
        reference=config.kl_weight > 0 and config.kl_in == "reward",
    )
    return scored.scores, list(scored.credits)


def selected_tokens(credit: Credit, arm: CreditConfig) -> Bool[Tensor, "batch response"]:
    """Return the tokens that an arm selects: its top or bottom share, or the tokens with a weight above 1.

    Weights above 1 count where the arm has no share: for soft and raw shapes, and for rules that score in weights; and
    where weights were permuted.
    """
    # Permuted weights, and weights without a share, are the only record of the selection.
    is_permuted = arm.rule == POSITION_MATCHED
    arm = applied(arm)
    if is_permuted and arm.shape == "only_top":
        return credit.scored & (credit.weights > 0)
    weighs = find_rule(arm.rule).weighs
    has_share = not weighs and arm.shape not in ("soft", "raw")
    if is_permuted or not has_share:
        return credit.scored & (credit.weights > 1)

    # A response without any positive score keeps weights of 1, so nothing of it is selected.
    has_score = (credit.scores > 0).any(1, keepdim=True)
    selects_largest = arm.shape != "bottom_q"
    return has_score & top_share(credit.scores, credit.scored, arm.share, largest=selects_largest)


def _read_value(text: str) -> Any:
    """Read numbers, true and false as JSON; any other text stays text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _write_value(value: Any) -> str:
    """Write a value so that :func:`_read_value` reads it back; 3.0 is written as 3."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value)
