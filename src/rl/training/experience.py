"""From rewards and scores to what an update learns from: the table of ``PPOConfig`` as one page of choices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rl.algorithm.advantages import gae, group_advantages, rloo_advantages, spread, token_rewards, whiten
from rl.algorithm.losses import kl_estimate
from rl.config import PPOConfig
from rl.credit.weights import loss_weights, potential_rewards, redistribute
from rl.records import Credit, Experience, Responses, TokenScores

Whitening = Callable[[Tensor, Tensor], Tensor]
"""Advantages and mask of this process -> advantages whitened over the batch of all processes."""


def build_experience(
    responses: Responses,
    scores: TokenScores,
    credit: Credit,
    config: PPOConfig,
    *,
    kl_weight: float,
    whitening: Whitening = whiten,
) -> Experience:
    """Advantages, returns, masks and weights of a scored rollout.

    Credit acts at one of three places: on the policy loss after whitening (``entry="advantage"``), on where the
    outcome reward stands (``"reward"``), or as a potential added to the rewards (``"potential"``).

    Args:
        responses: with rewards.
        scores: of the policy that wrote them.
        credit: scores and weights of the credit rule.
        config: of the run.
        kl_weight: beta at this step.
        whitening: over all processes.
    """
    mask = responses.response_mask
    loss_mask = mask & ~responses.truncated[:, None] if config.truncated == "mask" else mask
    kl = None
    if scores.ref_logprobs is not None and config.kl_in == "reward":
        kl = kl_estimate(scores.logprobs, scores.ref_logprobs, "k1").masked_fill(~mask, 0.0)
    if config.has_critic:
        advantages, returns = _with_critic(responses, scores, credit, config, kl, kl_weight)
        if config.whiten:
            advantages = whitening(advantages, loss_mask)
    else:
        advantages, returns = _by_group(responses, config, kl, kl_weight), None
    weights = torch.ones_like(advantages)
    if config.credit.entry == "advantage":
        weights = loss_weights(credit, advantages, mask, config.credit)
    return Experience(
        responses=responses,
        scores=scores,
        credit=credit,
        advantages=advantages,
        returns=returns,
        loss_mask=loss_mask,
        policy_weights=weights,
    )


def _with_critic(
    responses: Responses,
    scores: TokenScores,
    credit: Credit,
    config: PPOConfig,
    kl: Float[Tensor, "batch response"] | None,
    kl_weight: float,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """Token rewards as the entry point has them, and GAE over them."""
    assert scores.values is not None  # a critic was asked for
    assert scores.final_values is not None
    mask = responses.response_mask
    rewards = token_rewards(_outcome(responses, config), mask, kl=kl, kl_weight=kl_weight)
    if config.credit.entry == "reward":
        spread_out = redistribute(_outcome(responses, config), credit.scores, credit.scored, mask)
        rewards = spread_out + token_rewards(torch.zeros_like(responses.rewards), mask, kl=kl, kl_weight=kl_weight)
    elif config.credit.entry == "potential":
        scale, discount = config.credit.potential_scale, config.discount
        rewards = rewards + potential_rewards(credit.scores, credit.scored, mask, scale=scale, discount=discount)
    bootstrap = None
    if config.truncated == "bootstrap":
        bootstrap = torch.where(responses.truncated, scores.final_values, 0.0)
    return gae(
        rewards, scores.values, mask, discount=config.discount, gae_lambda=config.gae_lambda, bootstrap=bootstrap
    )


def _outcome(responses: Responses, config: PPOConfig) -> Float[Tensor, " batch"]:
    """Rewards after the penalty for responses that were cut off; the record keeps the task's own verdict."""
    return responses.rewards - config.missing_eos_penalty * responses.truncated.float()


def _by_group(
    responses: Responses, config: PPOConfig, kl: Float[Tensor, "batch response"] | None, kl_weight: float
) -> Float[Tensor, "batch response"]:
    """One advantage for a whole response, from the others of its problem."""
    rewards = _outcome(responses, config)
    if kl is not None:
        rewards = rewards - kl_weight * kl.sum(1)
    if config.advantage == "rloo":
        advantages = rloo_advantages(rewards, responses.groups)
    else:
        advantages = group_advantages(rewards, responses.groups, scale_std=config.scale_group_std)
    return spread(advantages, responses.response_mask)


def zero_variance_share(responses: Responses) -> float:
    """Share of problems whose responses all got the same reward: they teach a critic-free estimator nothing."""
    groups = responses.groups.unique()
    same: list[Bool[Tensor, ""]] = []
    for group in groups:
        rewards = responses.rewards[responses.groups == group]
        same.append((rewards == rewards[0]).all())
    return float(torch.stack(same).float().mean())
