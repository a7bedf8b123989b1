"""From rewards to advantages: rewards per token, GAE, baselines from the group, whitening.

B responses, R response columns. ``mask`` is True on the action tokens of a response, a run from column 0 (empty for
an empty response). Whatever stands on padding is ignored, results are 0 there. All of this happens once per rollout:
results are detached, in the dtype of the input, and means and variances are summed in float64.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rl.algorithm.tensor_checks import (
    described,
    require_finite,
    require_floats,
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
    r"""The verdict on the last action token, minus the price of leaving the reference on every action token.

    :math:`r_t = R\,[t = T-1] - \beta\, \mathrm{KL}_t`.

    Args:
        rewards: ``[B]``, one verdict per response; that of an empty response has no token to stand on.
        mask: ``[B, R]``, action tokens, an end token included.
        kl: ``[B, R]``, KL to the reference at each token.
        kl_weight: beta.

    Raises:
        ConfigError: wrong shapes, a mask with gaps, or numbers that are not finite.
    """
    require_run(mask)
    require_finite("rewards", rewards, mask.any(1))
    outcome = torch.where(last_tokens(mask), rewards.detach()[:, None], 0.0)
    if kl is None:
        return outcome
    require_finite("kl", kl, mask)
    require_range("kl_weight", kl_weight, 0 <= kl_weight < math.inf, "be at least 0", "0 turns the penalty off")
    return outcome - kl_weight * torch.where(mask, kl.detach(), 0.0)


def gae(
    rewards: Float[Tensor, "batch response"],
    values: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    *,
    discount: float,
    gae_lambda: float,
    bootstrap: Float[Tensor, " batch"] | None = None,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    r"""Generalised advantage estimation.

    :math:`\delta_t = r_t + \gamma V_{t+1} - V_t`, :math:`A_t = \delta_t + \gamma\lambda A_{t+1}`, with
    :math:`A_T = 0` and :math:`V_T` = ``bootstrap`` after the last action token.

    Args:
        rewards: ``[B, R]``, per token (:func:`token_rewards`).
        values: ``[B, R]``, the critic's value before each token.
        mask: ``[B, R]``, action tokens.
        discount: gamma, in [0, 1].
        gae_lambda: lambda, in [0, 1].
        bootstrap: ``[B]``, value of what would have followed the last token; None: 0, the response has ended.

    Returns:
        Advantages, and returns :math:`A_t + V_t`, the targets of the critic.

    Raises:
        ConfigError: wrong shapes, a mask with gaps, numbers that are not finite, or a setting outside its range.

    Cost: one backward loop over R columns. Source: Schulman et al., arXiv 1506.02438, eq. 16.
    """
    require_run(mask)
    require_finite("rewards", rewards, mask)
    require_finite("values", values, mask)
    for name, value in (("discount", discount), ("gae_lambda", gae_lambda)):
        require_range(name, value, 0 <= value <= 1, "lie in [0, 1]", "1 and 0.95 are the defaults")
    rewards = torch.where(mask, rewards.detach(), 0.0)
    values = torch.where(mask, values.detach(), 0.0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    if bootstrap is not None:
        require_finite("bootstrap", bootstrap, mask.any(1))
        following = torch.where(last_tokens(mask), bootstrap.detach()[:, None], following)
    surprise = rewards + discount * following - values  # on padding discount * 0, so the loop starts from 0
    advantages = torch.zeros_like(surprise)
    running = surprise.new_zeros(len(surprise))
    for column in reversed(range(surprise.shape[1])):
        running = surprise[:, column] + discount * gae_lambda * running
        advantages[:, column] = running
    return advantages, advantages + values


def group_advantages(
    rewards: Float[Tensor, " batch"], groups: Int64[Tensor, " batch"], *, scale_std: bool, epsilon: float = 1e-4
) -> Float[Tensor, " batch"]:
    r"""Each reward minus the mean of its group, over the group's standard deviation where asked for.

    :math:`A_i = (R_i - \bar R) / (\sigma + \epsilon)` with :math:`\sigma^2 = \sum_j (R_j - \bar R)^2 / (G - 1)`, the
    definition and the epsilon of TRL's GRPO. A group of equal rewards gives exact zeros.

    Args:
        rewards: ``[B]``, one verdict per response.
        groups: ``[B]``, responses of one prompt share a number.
        scale_std: divide (GRPO) or not (Dr. GRPO).
        epsilon: added to the standard deviation.

    Raises:
        ConfigError: wrong shapes, rewards that are not finite, or a group of one.

    Source: GRPO, arXiv 2402.03300; without the division, Dr. GRPO, arXiv 2503.20783.

    Example:
        >>> groups = torch.tensor([0, 0, 1, 1])
        >>> group_advantages(torch.tensor([1.0, 0, 3, 3]), groups, scale_std=False).tolist()
        [0.5, -0.5, 0.0, 0.0]
    """
    require_range("epsilon", epsilon, epsilon > 0, "be positive", "1e-4 is the default")
    deviation, index, sizes = _deviations(rewards, groups)
    if scale_std:
        squares = torch.zeros_like(sizes, dtype=deviation.dtype).index_add(0, index, deviation.square())
        deviation = deviation / ((squares / (sizes - 1)).sqrt() + epsilon)[index]
    return deviation.to(rewards.dtype)


def rloo_advantages(rewards: Float[Tensor, " batch"], groups: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    r"""Each reward minus the mean of the *others* of its group, a baseline that does not know this response.

    :math:`A_i = R_i - \frac{1}{G-1} \sum_{j \ne i} R_j = \frac{G}{G-1} (R_i - \bar R)`.

    Args:
        rewards: ``[B]``, one verdict per response.
        groups: ``[B]``, responses of one prompt share a number.

    Raises:
        ConfigError: wrong shapes, rewards that are not finite, or a group of one.

    Source: Ahmadian et al., arXiv 2402.14740.
    """
    deviation, index, sizes = _deviations(rewards, groups)
    return (deviation * (sizes / (sizes - 1.0))[index]).to(rewards.dtype)


def spread(
    per_sequence: Float[Tensor, " batch"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    """The number of each response on all of its tokens, 0 on padding."""
    require_mask("mask", mask)
    require_floats("per_sequence", per_sequence, mask.shape[:1])
    return torch.where(mask, per_sequence.detach()[:, None], 0.0)


def whiten(
    values: Float[Tensor, "batch response"], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"]:
    r"""Mean 0 and variance 1 over all action tokens of the batch, 0 on padding.

    :math:`(x - \bar x) / s` with the sample variance :math:`s^2 = \sum (x - \bar x)^2 / (n - 1)`. Only the mean is
    removed where n < 2, or where the numbers differ by no more than the rounding of their dtype: dividing by that
    would blow noise up to full size.

    Args:
        values: ``[B, R]``, advantages.
        mask: ``[B, R]``, tokens that count; any pattern.

    Raises:
        ConfigError: wrong shapes, or numbers that are not finite.
    """
    require_mask("mask", mask)
    require_finite("values", values, mask)
    white = torch.zeros_like(values, requires_grad=False)
    kept = values.detach()[mask].double()
    if kept.numel() == 0:
        return white
    centred = kept - kept.mean()
    if kept.numel() > 1:
        deviation = centred.std()
        if deviation > torch.finfo(values.dtype).eps * kept.abs().max():
            centred = centred / deviation
    white[mask] = centred.to(values.dtype)
    return white


def last_tokens(mask: Bool[Tensor, "batch response"]) -> Bool[Tensor, "batch response"]:
    """True on the last action token of each response; nowhere in an empty one."""
    ended = torch.cat([~mask[:, 1:], torch.ones_like(mask[:, :1])], 1)
    return mask & ended


def _deviations(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reward minus group mean in float64, the number of each response's group, and the sizes of the groups."""
    if not isinstance(groups, Tensor) or groups.dtype != torch.int64 or groups.ndim != 1:
        raise ConfigError(
            f"groups: must be an int64 tensor of shape (responses,), got {described(groups)}; give every response the "
            "number of its prompt"
        )
    require_finite("rewards", rewards, torch.ones_like(groups, dtype=torch.bool))
    names, index, sizes = groups.unique(return_inverse=True, return_counts=True)
    if bool((sizes < 2).any()):
        raise ConfigError(
            f"groups: must hold at least 2 responses each, got 1 in group {int(names[sizes < 2][0])}; "
            "use group_size >= 2"
        )
    wide = rewards.detach().double()
    lowest = wide.new_full(sizes.shape, math.inf).scatter_reduce(0, index, wide, "amin")
    above = wide - lowest[index]  # measured from the lowest, equal rewards leave no rounding behind
    mean = torch.zeros_like(lowest).index_add(0, index, above) / sizes
    return above - mean[index], index, sizes
