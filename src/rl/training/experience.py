"""From rewards and scores to what an update learns from, by the settings of ``PPOConfig``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rl.algorithm.advantages import gae, group_advantages, rloo_advantages, spread, token_rewards, whiten
from rl.algorithm.losses import kl_estimate, truncated_importance
from rl.config import PPOConfig
from rl.credit.weights import loss_weights, potential_rewards, redistribute
from rl.errors import ConfigError
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
    progress: float = 0.0,
) -> Experience:
    """Compute advantages, returns, masks and weights of a scored rollout.

    Credit acts at one of three places: on the policy loss after whitening (``entry="advantage"``), on the position of
    the outcome reward (``"reward"``), or as a potential added to the rewards (``"potential"``). Only the first gives
    weights other than 1.

    Args:
        responses: with rewards.
        scores: of the policy that wrote them.
        credit: scores and weights of the credit rule.
        config: of the run.
        kl_weight: beta at this step.
        whitening: over all processes.
        progress: share of the run that is done, in [0, 1], for weights that are annealed.

    Returns:
        The experience, detached, on the device of the responses.
    """
    # Truncated responses may be left out of the loss; they keep their part in the statistics of their group.
    mask = responses.response_mask
    loss_mask = mask
    if config.truncated == "mask":
        loss_mask = mask & ~responses.truncated[:, None]

    # Only the advantages of a critic are whitened.
    kl = _reward_kl(responses, scores, config)
    returns = None
    if config.has_critic:
        advantages, returns = _with_critic(responses, scores, credit, config, kl, kl_weight)
        if config.whiten:
            advantages = whitening(advantages, loss_mask)
    else:
        advantages = _by_group(responses, config, kl, kl_weight)

    # Weights multiply the whitened advantages: whitening afterwards would remove part of their effect.
    weights = torch.ones_like(advantages)
    if config.credit.entry == "advantage":
        weights = loss_weights(credit, advantages, mask, config.credit, progress=progress)
    if config.sampling_correction is not None:
        weights = weights * _sampling_correction(responses, scores, config.sampling_correction)
    return Experience(
        responses=responses,
        scores=scores,
        credit=credit,
        advantages=advantages,
        returns=returns,
        loss_mask=loss_mask,
        policy_weights=weights,
    )


def _sampling_correction(responses: Responses, scores: TokenScores, cap: float) -> Float[Tensor, "batch response"]:
    """Weigh tokens for the difference between generation and scoring; 1 on padding."""
    if responses.sampled_logprobs is None:
        raise ConfigError(
            f"sampling_correction: must be left out for a rollout without the log-probabilities of its sampling, got "
            f"{cap}; sample with PPOTrainer, or turn it off"
        )
    weights = truncated_importance(scores.logprobs, responses.sampled_logprobs, cap)
    return torch.where(responses.response_mask, weights, 1.0)


def _with_critic(
    responses: Responses,
    scores: TokenScores,
    credit: Credit,
    config: PPOConfig,
    kl: Float[Tensor, "batch response"] | None,
    kl_weight: float,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """Place the token rewards by the entry point, and compute GAE over them: advantages and returns."""
    # The critic of the run scored every token.
    assert scores.values is not None
    assert scores.final_values is not None
    mask = responses.response_mask
    outcome = _outcome(responses, config)

    rewards = token_rewards(outcome, mask, kl=kl, kl_weight=kl_weight)
    if config.credit.entry == "reward":
        # The outcome is spread over the tokens; the KL stays at the token where it arises.
        spread_out = redistribute(outcome, credit.scores, credit.scored, mask)
        no_outcome = torch.zeros_like(responses.rewards)
        rewards = spread_out + token_rewards(no_outcome, mask, kl=kl, kl_weight=kl_weight)
    elif config.credit.entry == "potential":
        shaping = potential_rewards(
            credit.scores,
            credit.scored,
            mask,
            scale=config.credit.potential_scale,
            discount=config.discount,
        )
        rewards = rewards + shaping

    # A truncated response may continue with the critic's value after its last token.
    bootstrap = None
    if config.truncated == "bootstrap":
        bootstrap = torch.where(responses.truncated, scores.final_values, 0.0)
    return gae(
        rewards,
        scores.values,
        mask,
        discount=config.discount,
        gae_lambda=config.gae_lambda,
        bootstrap=bootstrap,
    )


def compared_rewards(
    responses: Responses, scores: TokenScores, config: PPOConfig, *, kl_weight: float
) -> Float[Tensor, " batch"]:
    """Compute the total reward of each response that the advantages are built from.

    ``task reward - missing_eos_penalty [truncated] - beta sum_t k1_t``; the last term only where the KL belongs to the
    reward. Estimators that compare the responses to one problem compare these numbers.

    Args:
        responses: with rewards.
        scores: of the policy that wrote them.
        config: of the run.
        kl_weight: beta at this step.

    Returns:
        ``[B]`` float32.
    """
    outcome = _outcome(responses, config)
    kl = _reward_kl(responses, scores, config)
    return _less_kl(outcome, kl, kl_weight)


def _reward_kl(responses: Responses, scores: TokenScores, config: PPOConfig) -> Float[Tensor, "batch response"] | None:
    """Estimate the KL k1 = log(pi_old / pi_ref) per token, where the KL belongs to the reward; None elsewhere."""
    if scores.ref_logprobs is None or config.kl_in != "reward":
        return None
    kl = kl_estimate(scores.logprobs, scores.ref_logprobs, "k1")
    return kl.masked_fill(~responses.response_mask, 0.0)


def _less_kl(
    rewards: Float[Tensor, " batch"], kl: Float[Tensor, "batch response"] | None, kl_weight: float
) -> Float[Tensor, " batch"]:
    """Subtract beta times the KL of the response."""
    if kl is None:
        return rewards
    return rewards - kl_weight * kl.sum(1)


def _outcome(responses: Responses, config: PPOConfig) -> Float[Tensor, " batch"]:
    """Subtract the penalty for truncated responses; the record keeps the task's own reward."""
    penalty = config.missing_eos_penalty * responses.truncated.float()
    return responses.rewards - penalty


def _by_group(
    responses: Responses, config: PPOConfig, kl: Float[Tensor, "batch response"] | None, kl_weight: float
) -> Float[Tensor, "batch response"]:
    """Compute one advantage for each response, from the other responses to its problem, and copy it to all tokens."""
    outcome = _outcome(responses, config)
    rewards = _less_kl(outcome, kl, kl_weight)
    if config.advantage == "rloo":
        advantages = rloo_advantages(rewards, responses.groups)
    else:
        advantages = group_advantages(rewards, responses.groups, scale_std=config.scale_group_std)
    return spread(advantages, responses.response_mask)


def zero_variance_share(responses: Responses) -> float:
    """Compute the share of problems whose responses all have the same reward.

    Such problems have advantage 0 in a critic-free estimator, and so no gradient.

    Args:
        responses: whose rewards are those of :func:`compared_rewards`: with penalties, as the advantages see them.
    """
    is_constant: list[Tensor] = []
    for group in responses.groups.unique():
        rewards = responses.rewards[responses.groups == group]
        is_constant.append((rewards == rewards[0]).all())
    return float(torch.stack(is_constant).float().mean())
