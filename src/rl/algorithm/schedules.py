"""Compute the learning rate and the KL weight as functions of the step, without state to save."""

from __future__ import annotations

import math

from rl.config import PPOConfig

_KL_HORIZON = 10_000
"""Responses over which beta adapts (Ziegler et al. 2019, arXiv 1909.08593)."""

_KL_MAX_ERROR = 0.2
"""Bound on the relative error of the KL in one adaptation (same source)."""


def learning_rate_factor(config: PPOConfig, step: int) -> float:
    """Compute the factor of the learning rate: linear warm-up, then constant, linear to 0, or half a cosine to 0.

    Args:
        config: schedule, warm-up and number of steps.
        step: from 0.

    Returns:
        A factor in (0, 1].

    Example:
        >>> config = PPOConfig(steps=10, warmup_steps=2, lr_schedule="linear")
        >>> [round(learning_rate_factor(config, step), 3) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return 1 - progress
    return (1 + math.cos(math.pi * progress)) / 2


def adapted_kl_weight(weight: float, kl: float, target: float, num_responses: int) -> float:
    """Adapt beta towards a KL target: ``beta * (1 + clip(kl / target - 1, -0.2, 0.2) * responses / 10000)``.

    Args:
        weight: beta, before the step.
        kl: mean KL of a response, in nats.
        target: KL that beta is adapted to, in nats.
        num_responses: responses of the step.

    Returns:
        Beta for the next step.

    Source: Ziegler et al., arXiv 1909.08593.

    Example:
        >>> round(adapted_kl_weight(0.1, 12.0, 6.0, 1000), 6), round(adapted_kl_weight(0.1, 0.0, 6.0, 1000), 6)
        (0.102, 0.098)
    """
    error = kl / target - 1
    bounded_error = min(_KL_MAX_ERROR, max(-_KL_MAX_ERROR, error))
    return weight * (1 + bounded_error * num_responses / _KL_HORIZON)
