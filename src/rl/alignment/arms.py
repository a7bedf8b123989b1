"""Arms of a comparison: credit settings as short texts, and what they all make of one batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

from jaxtyping import Bool
from torch import Tensor

from rl.config import CreditConfig, PPOConfig, Shape
from rl.credit.registry import find_rule
from rl.credit.scoring import score_with_settings
from rl.credit.weights import top_share
from rl.errors import ConfigError
from rl.policy.actor_critic import ActorCritic
from rl.records import Credit, Responses, TokenScores


def parse_arm(text: str) -> CreditConfig:
    """Credit settings from ``RULE[:SHAPE][:NAME=VALUE,...]``, such as ``flow:top_q:share=0.2,strength=3``.

    Settings are those of :class:`rl.config.CreditConfig`; ``options.NAME`` is a setting of the rule itself.

    Raises:
        ConfigError: a part that is neither a shape nor a setting, or a value that breaks a rule.
        CreditError: an unknown rule.

    Example:
        >>> parse_arm("entropy:only_top:share=0.2").shape
        'only_top'
    """
    rule, *parts = (part.strip() for part in text.split(":"))
    find_rule(rule)
    settings: dict[str, Any] = {"rule": rule}
    shapes, names = (
        get_args(Shape),
        [item.name for item in fields(CreditConfig) if item.name not in ("rule", "options")],
    )
    for part in (piece.strip() for joined in parts for piece in joined.split(",")):
        name, sign, value = (side.strip() for side in part.partition("="))
        if not sign and name in shapes:
            settings["shape"] = name
        elif sign and name.startswith("options.") and name != "options.":
            settings.setdefault("options", {})[name.removeprefix("options.")] = _value(value)
        elif sign and name in names:
            settings[name] = value if name in ("layers", "heads") else _value(value)
        else:
            raise ConfigError(
                f"arms: {text!r} must be RULE:SHAPE:NAME=VALUE,NAME=VALUE, got {part!r} in it; shapes are "
                f"{', '.join(shapes)}, and settings {', '.join(names)} and options.NAME"
            )
    return CreditConfig(**settings)


def split_arms(text: str) -> list[str]:
    """Arms from one comma-separated text; a piece that is only a setting belongs to the arm before it.

    Example:
        >>> split_arms("uniform,flow:top_q:share=0.2,strength=3,entropy")
        ['uniform', 'flow:top_q:share=0.2,strength=3', 'entropy']
    """
    arms: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if arms and "=" in piece and ":" not in piece.partition("=")[0]:
            arms[-1] += f",{piece}"
        elif piece:
            arms.append(piece)
    return arms


def arm_name(credit: CreditConfig) -> str:
    """The shortest text from which :func:`parse_arm` makes these settings.

    Example:
        >>> arm_name(parse_arm("flow:top_q:strength=1.5,share=0.2"))
        'flow:share=0.2'
    """
    plain = CreditConfig(rule=credit.rule)
    parts = [] if credit.shape == plain.shape else [credit.shape]
    changed = [
        f"{item.name}={_text(getattr(credit, item.name))}"
        for item in fields(credit)
        if item.name not in ("rule", "shape", "options") and getattr(credit, item.name) != getattr(plain, item.name)
    ]
    changed += [f"options.{name}={_text(value)}" for name, value in credit.options.items()]
    return ":".join([credit.rule, *parts, *([",".join(changed)] if changed else [])])


def named_arms(arms: Sequence[str | CreditConfig]) -> dict[str, CreditConfig]:
    """Settings by name, in the given order.

    Raises:
        ConfigError: the same settings twice, or something that is neither text nor settings.
        CreditError: an unknown rule.
    """
    named: dict[str, CreditConfig] = {}
    for arm in arms:
        if not isinstance(arm, (str, CreditConfig)):
            raise ConfigError(f"arms: must be texts or CreditConfig, got {type(arm).__name__}; write 'flow:soft'")
        credit = parse_arm(arm) if isinstance(arm, str) else arm
        find_rule(credit.rule)
        name = arm_name(credit)
        if name in named:
            raise ConfigError(f"arms: must differ, got {name!r} twice; leave one of them out")
        named[name] = credit
    return named


def score_arms(
    policy: ActorCritic, responses: Responses, arms: Sequence[CreditConfig], config: PPOConfig, *, step: int
) -> tuple[TokenScores, list[Credit]]:
    """Scores of every response token and the credit of every arm, from one forward pass that all arms listen to.

    A KL in the reward costs a second pass, and each rule registered with ``gradient=True`` one of its own.

    Args:
        policy: whose gradient is measured.
        responses: on the CPU; results come back there.
        arms: credit settings.
        config: temperature, micro-batches, KL and seed.
        step: number of the batch, as part of the seed of rules that draw.
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
    """Tokens that an arm singles out: its top (or bottom) share, or those it raises where it has no such share."""
    if find_rule(arm.rule).weighs or arm.shape in ("soft", "raw"):
        return credit.scored & (credit.weights > 1)
    acts = (credit.scores > 0).any(1, keepdim=True)
    return acts & top_share(credit.scores, credit.scored, arm.share, largest=arm.shape != "bottom_q")


def _value(text: str) -> Any:
    """Numbers, true and false as JSON writes them; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _text(value: Any) -> str:
    """What :func:`_value` reads back; whole numbers without their .0."""
    if isinstance(value, str):
        return value
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)
