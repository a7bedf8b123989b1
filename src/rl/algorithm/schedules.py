"""Compute the learning rate and the KL weight as functions of the step, without state to save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rl.config import OWN_SCHEDULES, PPOConfig
from rl.errors import ConfigError

_KL_HORIZON = 10_000
"""Responses over which beta adapts (Ziegler et al. 2019, arXiv 1909.08593)."""

_KL_MAX_ERROR = 0.2
"""Bound on the relative error of the KL in one adaptation (same source)."""


# What the schedules of transformers raise for options that are missing, unknown or of another type.
_OPTION_FAILURES = (TypeError, ValueError, ArithmeticError, LookupError)


def learning_rate_factor(config: PPOConfig, step: int, rewards: Sequence[float] = ()) -> float:
    """Compute the factor of the learning rate: linear warm-up, then constant, linear to 0, or half a cosine to 0.

    The other names are schedules of transformers, computed by its own functions. Two of them react to rewards and are
    replayed from all that came before, so there is no state to save.

    Args:
        config: schedule, its options, warm-up and number of steps.
        step: from 0.
        rewards: those that a reacting schedule has seen so far.

    Returns:
        A factor of at least 0; in (0, 1] for the three schedules of this package.

    Raises:
        ConfigError: options that the schedule of transformers does not take.

    Example:
        >>> config = PPOConfig(steps=10, warmup_steps=2, lr_schedule="linear")
        >>> [round(learning_rate_factor(config, step), 3) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    if config.lr_schedule not in OWN_SCHEDULES:
        return _factor_of_transformers(config, step, rewards)
    # The first step of the warm-up already moves, and its last one has the full rate.
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0

    # The share of the steps after the warm-up that is done, in [0, 1).
    num_steps = max(1, config.steps - config.warmup_steps)
    progress = (step - config.warmup_steps) / num_steps
    if config.lr_schedule == "linear":
        return 1 - progress
    return (1 + math.cos(math.pi * progress)) / 2


def depends_on_length(config: PPOConfig) -> bool:
    """Tell whether a longer run has other learning rates, or other credit weights, at its beginning."""
    if config.credit.anneal > 0:
        return True
    free = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
    return config.lr_schedule not in free


def check_schedule(config: PPOConfig) -> None:
    """Check the options of a schedule before a run, at its first and its last step.

    Raises:
        ConfigError: options that the schedule does not take, or a rate outside the limits that they set.
    """
    for step in (0, config.steps - 1):
        factor = learning_rate_factor(config, step)
        if not 0 <= factor < math.inf:
            raise ConfigError(
                f"lr_schedule_options: must keep the learning rate finite and at least 0, got {factor!r} times "
                f"learning_rate at step {step} with {config.lr_schedule_options!r}; change them"
            )


def _factor_of_transformers(config: PPOConfig, step: int, rewards: Sequence[float]) -> float:
    """Compute the factor of a schedule of transformers, from a scheduler over a stand-in for the optimizer."""
    import torch
    from transformers import get_scheduler

    # The scheduler changes only the learning rate of the stand-in, which never makes a step.
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=config.learning_rate)
    options = dict(config.lr_schedule_options)
    reacts = config.lr_schedule in ("reduce_lr_on_plateau", "greedy")
    if reacts:
        # transformers follows a loss; a reward is to grow.
        options = {"mode": "max", **options}
    try:
        scheduler: Any = get_scheduler(
            config.lr_schedule,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.steps,
            scheduler_specific_kwargs=options,
        )
        if not reacts:
            return float(scheduler.lr_lambdas[0](step))
        # Replay: the state of the scheduler is a function of the rewards.
        for reward in rewards:
            scheduler.step(reward)
    except _OPTION_FAILURES as error:
        raise ConfigError(
            f"lr_schedule_options: must be those of {config.lr_schedule!r} in transformers, got "
            f"{config.lr_schedule_options!r} ({error}); see get_scheduler there"
        ) from error

    # The two that react have no warm-up in transformers.
    _check_limits(config, scheduler)
    factor = float(optimizer.param_groups[0]["lr"]) / config.learning_rate
    if step < config.warmup_steps:
        factor *= (step + 1) / config.warmup_steps
    return factor


def _check_limits(config: PPOConfig, scheduler: Any) -> None:
    """Check that the learning rate lies within the limits of a reacting schedule, which would move it there at once."""
    rate = config.learning_rate
    least = max(scheduler.min_lrs)
    most = min(getattr(scheduler, "max_lrs", [math.inf]))
    if not least <= rate <= most:
        raise ConfigError(
            f"lr_schedule_options: min_lr and max_lr must enclose learning_rate={rate:g}, got {least:g} and {most:g}; "
            "set both"
        )


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
