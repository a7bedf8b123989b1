"""Quantities that change from step to step, as functions of the step: nothing to save."""

from __future__ import annotations

import math

from rl.config import PPOConfig

_KL_HORIZON = 10_000
"""Responses over which beta adapts (Ziegler et al. 2019, arXiv 1909.08593)."""


def learning_rate_factor(config: PPOConfig, step: int) -> float:
    """Warm-up, then constant, linear to 0, or half a cosine to 0.

    Example:
        >>> config = PPOConfig(steps=10, warmup_steps=2, lr_schedule="linear")
        >>> [round(learning_rate_factor(config, step), 3) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 1 - done if config.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def adapted_kl_weight(weight: float, kl: float, target: float, num_responses: int) -> float:
    """``beta * (1 + clip(kl / target - 1, -0.2, 0.2) * responses / 10000)`` (Ziegler et al. 2019, equation 3).

    Example:
        >>> round(adapted_kl_weight(0.1, 12.0, 6.0, 1000), 6), round(adapted_kl_weight(0.1, 0.0, 6.0, 1000), 6)
        (0.102, 0.098)
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return weight * (1 + error * num_responses / _KL_HORIZON)
