"""Compute advantages from rewards: token rewards, GAE, group baselines, whitening.

Shapes: B responses, R response columns. ``mask`` is True on the action tokens of a response, a run from column 0
(empty for an empty response). Values on padding are ignored, and results are 0 there. These functions run once per
rollout: results are detached and have the dtype of the input; means and variances are summed in float64.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl.algorithm.tensor_checks import (
    require_finite,
    require_floats,
    require_indices,
    require_mask,
    require_range,
    require_run,
)
from rl.errors import ConfigError


def token_rewards(
    rewards: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch response"],
    *,
    kl: Float[Tensor, "batch response"] | None = None,
    kl_weight: float = 0.0,
) -> Float[Tensor, "batch response"]:
    r"""Put the reward of a response on its last action token and subtract a KL penalty on every action token.

    :math:`r_t = R\,[t = T-1] - \beta\, \mathrm{KL}_t`.

    Args:
        rewards: ``[B]``, one reward per response; that of an empty response is ignored.
        mask: ``[B, R]``, action tokens, an end token included.
        kl: ``[B, R]``, KL to the reference at each token, in nats.
        kl_weight: beta, in units of reward per nat.

    Returns:
        ``[B, R]``, in units of reward.

    Raises:
        ConfigError: wrong shapes, a mask with gaps, or numbers that are not finite.

    Source: Ziegler et al., arXiv 1909.08593, eq. 2.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> token_rewards(torch.tensor([1.0]), mask).tolist()
        [[0.0, 1.0, 0.0]]
    """
    require_run(mask)
    require_finite("rewards", rewards, mask.any(1))
    outcome = torch.where(last_tokens(mask), rewards.detach()[:, None], 0.0)
    if kl is None:
        return outcome
    require_finite("kl", kl, mask)
    require_range("kl_weight", kl_weight, 0 <= kl_weight < math.inf, "be at least 0", "0 turns the penalty off")
    kl_of_tokens = torch.where(mask, kl.detach(), 0.0)
    return outcome - kl_weight * kl_of_tokens


def gae(
    rewards: Float[Tensor, "batch response"],
    values: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    discount: float,
    gae_lambda: float,
    bootstrap: Float[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    r"""Compute generalised advantage estimates and the targets of the critic.

    :math:`\delta_t = r_t + \gamma V_{t+1} - V_t`, :math:`A_t = \delta_t + \gamma\lambda A_{t+1}`, with
    :math:`A_T = 0` and :math:`V_T` = ``bootstrap`` after the last action token.

    Args:
        rewards: ``[B, R]``, per token (:func:`token_rewards`).
        values: ``[B, R]``, the critic's value before each token, in units of reward.
        mask: ``[B, R]``, action tokens.
        discount: gamma, in [0, 1].
        gae_lambda: lambda, in [0, 1].
        bootstrap: ``[B]``, value of the state after the last token; None: 0, the response has ended.

    Returns:
        Advantages ``[B, R]``, and returns :math:`A_t + V_t` ``[B, R]``, the targets of the critic.

    Raises:
        ConfigError: wrong shapes, a mask with gaps, numbers that are not finite, or a setting outside its range.

    Cost: one backward loop over R columns.

    Source: Schulman et al., arXiv 1506.02438, eq. 16.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> advantages, returns = gae(rewards, values, mask, discount=1.0, gae_lambda=1.0)
        >>> advantages.tolist(), returns.tolist()
        ([[0.5, 0.75]], [[1.0, 1.0]])
    """
    require_run(mask)
    require_finite("rewards", rewards, mask)
    require_finite("values", values, mask)
    for name, value in (("discount", discount), ("gae_lambda", gae_lambda)):
        require_range(name, value, 0 <= value <= 1, "lie in [0, 1]", "1 and 0.95 are the defaults")

    # V_t and V_{t+1}; after the last action token V_T is the bootstrap.
    rewards = torch.where(mask, rewards.detach(), 0.0)
    values = torch.where(mask, values.detach(), 0.0)
    after_the_last_column = torch.zeros_like(values[:, :1])
    next_values = torch.cat([values[:, 1:], after_the_last_column], 1)
    if bootstrap is not None:
        require_finite("bootstrap", bootstrap, mask.any(1))
        is_last = last_tokens(mask)
        next_values = torch.where(is_last, bootstrap.detach()[:, None], next_values)

    # delta_t = r_t + gamma V_{t+1} - V_t; it is 0 on padding, so the recursion enters the response with A_T = 0.
    delta = rewards + discount * next_values - values

    # A_t = delta_t + gamma lambda A_{t+1}, from the last column to the first.
    advantages = torch.zeros_like(delta)
    advantage = delta.new_zeros(len(delta))
    for column in reversed(range(delta.shape[1])):
        advantage = delta[:, column] + discount * gae_lambda * advantage
        advantages[:, column] = advantage
    return advantages, advantages + values


def group_advantages(
    rewards: Float[Tensor, " batch"], groups: Int64[Tensor, " batch"], *, scale_std: bool, epsilon: float = 1e-4
) -> Float[Tensor, " batch"]:
    r"""Subtract the mean of its group from each reward, and optionally divide by the group's standard deviation.

    :math:`A_i = (R_i - \bar R) / (\sigma + \epsilon)` with :math:`\sigma^2 = \sum_j (R_j - \bar R)^2 / (G - 1)`, the
    definition and the epsilon of TRL's GRPO. A group of equal rewards gives exact zeros.

    Args:
        rewards: ``[B]``, one reward per response.
        groups: ``[B]``, responses to one prompt share a number.
        scale_std: divide (GRPO) or not (Dr. GRPO).
        epsilon: added to the standard deviation, in units of reward.

    Returns:
        ``[B]``; :func:`spread` copies it to the tokens.

    Raises:
        ConfigError: wrong shapes, rewards that are not finite, or a group of one.

    Source: GRPO, arXiv 2402.03300, section 4.1.2; without the division, Dr. GRPO, arXiv 2503.20783, section 3.2.

    Example:
        >>> groups = torch.tensor([0, 0, 1, 1])
        >>> group_advantages(torch.tensor([1.0, 0, 3, 3]), groups, scale_std=False).tolist()
        [0.5, -0.5, 0.0, 0.0]
    """
    require_range("epsilon", epsilon, epsilon > 0, "be positive", "1e-4 is the default")
    deviation, group_index, group_sizes = _deviations(rewards, groups)
    if scale_std:
        # sigma^2 of each group, with the sample normalisation G - 1.
        zeros = torch.zeros_like(group_sizes, dtype=deviation.dtype)
        squares = zeros.index_add(0, group_index, deviation.square())
        sigma = (squares / (group_sizes - 1)).sqrt()
        divisor = sigma + epsilon
        deviation = deviation / divisor[group_index]
    return deviation.to(rewards.dtype)


def rloo_advantages(rewards: Float[Tensor, " batch"], groups: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    r"""Subtract from each reward the mean of the *other* rewards in its group, an unbiased baseline.

    :math:`A_i = R_i - \frac{1}{G-1} \sum_{j \ne i} R_j = \frac{G}{G-1} (R_i - \bar R)`.

    Args:
        rewards: ``[B]``, one reward per response.
        groups: ``[B]``, responses to one prompt share a number.

    Returns:
        ``[B]``; :func:`spread` copies it to the tokens.

    Raises:
        ConfigError: wrong shapes, rewards that are not finite, or a group of one.

    Source: RLOO, Ahmadian et al., arXiv 2402.14740.

    Example:
        >>> rloo_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0])).tolist()
        [1.0, -1.0]
    """
    deviation, group_index, group_sizes = _deviations(rewards, groups)
    scale = group_sizes / (group_sizes - 1.0)
    return (deviation * scale[group_index]).to(rewards.dtype)


def spread(
    per_sequence: Float[Tensor, " batch"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """Copy the number of each response to all of its tokens, and 0 to padding.

    Args:
        per_sequence: ``[B]``, one number per response.
        mask: ``[B, R]``, action tokens.

    Raises:
        ConfigError: wrong shapes.
    """
    require_mask("mask", mask)
    require_floats("per_sequence", per_sequence, mask.shape[:1])
    return torch.where(mask, per_sequence.detach()[:, None], 0.0)


def whiten(
    values: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    r"""Shift and scale to mean 0 and variance 1 over all action tokens of the batch.

    :math:`(x - \bar x) / s` with the sample variance :math:`s^2 = \sum (x - \bar x)^2 / (n - 1)`. Where n < 2, or where
    the numbers differ by no more than the rounding of their dtype, only the mean is removed: the division would
    amplify rounding errors to variance 1.

    Args:
        values: ``[B, R]``, advantages.
        mask: ``[B, R]``, tokens that count; gaps are valid.

    Returns:
        ``[B, R]``, dimensionless; 0 outside the mask.

    Raises:
        ConfigError: wrong shapes, or numbers that are not finite.
    """
    require_mask("mask", mask)
    require_finite("values", values, mask)
    whitened = torch.zeros_like(values, requires_grad=False)
    selected = values.detach()[mask].double()
    if selected.numel() == 0:
        return whitened

    centred = selected - selected.mean()
    if selected.numel() > 1:
        # A deviation within the rounding of the dtype is noise, and is not scaled to 1.
        deviation = centred.std()
        largest = selected.abs().max()
        rounding = torch.finfo(values.dtype).eps * largest
        if deviation > rounding:
            centred = centred / deviation
    whitened[mask] = centred.to(values.dtype)
    return whitened


def last_tokens(mask: Bool[Tensor, "batch response"]) -> Bool[Tensor, "batch response"]:
    """Mark the last action token of each response; an empty response has none."""
    after_the_last_column = torch.ones_like(mask[:, :1])
    next_is_padding = torch.cat([~mask[:, 1:], after_the_last_column], 1)
    return mask & next_is_padding


def _deviations(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return reward minus group mean in float64, the group number of each response, and the group sizes."""
    require_indices("groups", groups, "(responses,)", 1, "give every response the number of its prompt")
    require_finite("rewards", rewards, torch.ones_like(groups, dtype=torch.bool))
    names, group_index, group_sizes = groups.unique(return_inverse=True, return_counts=True)
    too_small = group_sizes < 2
    if bool(too_small.any()):
        raise ConfigError(
            f"groups: must hold at least 2 responses each, got 1 in group {int(names[too_small][0])}; "
            "use group_size >= 2"
        )

    # Rewards are measured from the lowest of their group, so that equal rewards give exact zeros.
    precise = rewards.detach().double()
    infinite = precise.new_full(group_sizes.shape, math.inf)
    lowest = infinite.scatter_reduce(0, group_index, precise, "amin")
    above_lowest = precise - lowest[group_index]
    total = torch.zeros_like(lowest).index_add(0, group_index, above_lowest)
    mean = total / group_sizes
    deviation = above_lowest - mean[group_index]
    return deviation, group_index, group_sizes
