"""Rewards, advantages and weights of a rollout, against numbers that were worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rl import ConfigError, Credit, CreditConfig, Experience, PPOConfig, Responses, Sample, TokenScores, shape_weights
from rl.credit.scope import tokens_in_scope
from rl.training.experience import build_experience, compared_rewards, zero_variance_share

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
VALUES = torch.tensor([[0.5, 0.25, 0.0], [0.5, 0.5, 0.0], [0.25, 0.0, 0.0], [0.0, 0.5, 1.0]])
LOGPROBS = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -1.0, 0.0], [-3.0, 0.0, 0.0], [-1.0, -1.0, -1.0]])
REFERENCE = torch.tensor([[-1.5, -2.0, -2.0], [-1.0, -0.5, 0.0], [-3.0, 0.0, 0.0], [-1.0, -1.0, -3.0]])
KL = torch.tensor([[0.5, 0.0, 1.0], [0.0, -0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0])
SCORES = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
WEIGHTS = torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 1.0], [2.0, 1.0, 1.0], [2.0, 1.0, 2.0]])


def rollout() -> Responses:
    """Two problems, two responses each; the last response was cut off."""
    ids = torch.zeros(4, 4, dtype=torch.int64)
    prompt = torch.ones(4, 1, dtype=torch.bool)
    return Responses(
        samples=tuple(Sample(index, "p", "a") for index in (0, 0, 1, 1)), completions=("",) * 4, input_ids=ids,
        attention_mask=torch.cat([prompt, MASK], 1), prompt_length=1, response_mask=MASK,
        truncated=torch.tensor([False, False, False, True]), groups=torch.tensor([0, 0, 1, 1]), rewards=REWARDS.clone(),
        question=torch.cat([prompt, torch.zeros_like(MASK)], 1), answer=torch.zeros(4, 4, dtype=torch.bool),
    )  # fmt: skip


def built(responses: Responses | None = None, *, kl_weight: float = 0.0, credit=None, **settings) -> Experience:
    config = PPOConfig(**({"whiten": False} | settings), credit=credit or CreditConfig(rule="uniform"))
    critic = config.has_critic
    scores = TokenScores(
        LOGPROBS, -LOGPROBS, REFERENCE, VALUES if critic else None,
        torch.tensor([9.0, 9.0, 9.0, 0.75]) if critic else None,
    )  # fmt: skip
    given = Credit(SCORES, MASK, WEIGHTS)
    return build_experience(responses or rollout(), scores, given, config, kl_weight=kl_weight)


def close(got: Tensor | None, expected: list) -> None:
    assert got is not None
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=1e-6)


def test_gae_with_lambda_1_is_what_follows_minus_the_value():
    made = built(gae_lambda=1.0)
    close(made.returns, [[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]])
    close(made.advantages, [[0.5, 0.75, 1], [-0.5, -0.5, 0], [0.75, 0, 0], [0, -0.5, -1]])


def test_gae_with_lambda_0_looks_one_token_ahead():
    made = built(gae_lambda=0.0)
    close(made.advantages, [[-0.25, -0.25, 1], [0, -0.5, 0], [0.75, 0, 0], [0.5, 0.5, -1]])
    close(made.returns, [[0.25, 0, 1], [0.5, 0, 0], [1, 0, 0], [0.5, 1, 0]])


def test_gae_with_a_discount_and_a_lambda():
    """First response: deltas 0.5*0.25-0.5, 0.5*0-0.25, 1-0 = -0.375, -0.25, 1; factor 0.25 from one to the next."""
    made = built(gae_lambda=0.5, discount=0.5)
    close(made.advantages[:1], [[-0.375 + 0.25 * (-0.25 + 0.25), -0.25 + 0.25, 1]])


def test_kl_is_paid_where_it_arises():
    made = built(gae_lambda=1.0, kl_weight=0.1)
    close(made.returns, [[0.85, 0.9, 0.9], [0.05, 0.05, 0], [1, 0, 0], [-0.2, -0.2, -0.2]])
    in_loss = built(gae_lambda=1.0, kl_weight=0.1, kl_in="loss")
    close(in_loss.returns, [[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]])


def test_the_value_after_the_last_token_counts_only_where_a_response_was_cut_off():
    made = built(gae_lambda=1.0, truncated="bootstrap")
    close(made.returns, [[1, 1, 1], [0, 0, 0], [1, 0, 0], [0.75, 0.75, 0.75]])


def test_the_penalty_for_a_missing_end():
    made = built(gae_lambda=1.0, missing_eos_penalty=0.5)
    close(made.returns, [[1, 1, 1], [0, 0, 0], [1, 0, 0], [-0.5, -0.5, -0.5]])
    assert torch.equal(made.responses.rewards, REWARDS)


def test_whitening_has_mean_0_and_variance_1_over_the_tokens_that_count():
    plain, white = built(gae_lambda=1.0), built(gae_lambda=1.0, whiten=True)
    kept = plain.advantages[MASK]
    expected = torch.zeros(4, 3)
    expected[MASK] = (kept - kept.mean()) / kept.std()
    close(white.advantages, expected.tolist())
    assert torch.equal(white.returns, plain.returns)
    masked = built(gae_lambda=1.0, whiten=True, truncated="mask")
    kept = plain.advantages[:3][MASK[:3]]
    expected = torch.zeros(4, 3)
    expected[:3][MASK[:3]] = (kept - kept.mean()) / kept.std()
    close(masked.advantages, expected.tolist())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"advantage": "group", "scale_group_std": False}, [0.5, -0.5, 0.5, -0.5]),
        ({"advantage": "group"}, [0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4)] * 2),
        ({"advantage": "rloo"}, [1, -1, 1, -1]),
        # summed KL 1.5, -0.5, 0, 2 at 0.2: rewards 0.7, 0.1, 1, -0.4
        ({"advantage": "rloo", "kl_weight": 0.2}, [0.6, -0.6, 1.4, -1.4]),
        ({"advantage": "rloo", "kl_weight": 0.2, "kl_in": "loss"}, [1, -1, 1, -1]),
        ({"advantage": "rloo", "missing_eos_penalty": 0.5}, [1, -1, 1.5, -1.5]),
    ],
)
def test_critic_free_advantages_stand_on_every_token(settings: dict, expected: list[float]):
    made = built(**settings)
    close(made.advantages, [[value * float(on) for on in row] for value, row in zip(expected, MASK, strict=True)])
    assert made.returns is None


def test_truncated_responses_leave_the_losses_only_where_asked_for():
    assert torch.equal(built().loss_mask, MASK)
    masked = built(truncated="mask").loss_mask
    assert torch.equal(masked[:3], MASK[:3])
    assert not masked[3].any()


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        ({}, WEIGHTS.tolist()),
        ({"sign": "non_negative"}, [[1, 2, 1], [1, 1, 1], [2, 1, 1], [2, 1, 1]]),
        ({"sign": "asymmetric"}, [[1, 2, 1], [1, 1, 1], [2, 1, 1], [2, 1, 0.5]]),
        ({"mean_one": True}, [[0.75, 1.5, 0.75], [1, 1, 0], [1, 0, 0], [1.2, 0.6, 1.2]]),
        ({"entry": "reward"}, [[1, 1, 1]] * 4),
        ({"entry": "potential"}, [[1, 1, 1]] * 4),
    ],
)
def test_weights_of_the_policy_loss(credit: dict, expected: list[list[float]]):
    """The advantages of the last response are 0, -0.5 and -1: weights act on its first token under every sign."""
    made = built(credit=CreditConfig(rule="uniform", **credit), gae_lambda=1.0)
    close(made.policy_weights, expected)
    assert torch.equal(made.credit.weights, WEIGHTS)


@pytest.mark.parametrize("sign", ["all", "non_negative", "asymmetric"])
@pytest.mark.parametrize("entry", ["advantage", "reward", "potential"])
def test_tokens_after_the_answer_have_weight_1_at_every_entry_point(entry: str, sign: str):
    """The first token is reasoning, the second the answer; the third, an end token, scores 0."""
    answer = torch.zeros(4, 4, dtype=torch.bool)
    answer[:, 2] = MASK[:, 1]
    responses = replace(rollout(), answer=answer)
    scored = tokens_in_scope(responses, "response")
    credit = CreditConfig(rule="flow", shape="soft", entry=entry, sign=sign, mean_one=True)
    given = Credit(SCORES, scored, shape_weights(SCORES, scored, credit))
    config = PPOConfig(credit=credit)
    scores = TokenScores(LOGPROBS, -LOGPROBS, None, VALUES, torch.zeros(4))
    made = build_experience(responses, scores, given, config, kl_weight=0.0)
    close(made.policy_weights[0, 2:], [1.0])
    close(made.policy_weights[3, 2:], [1.0])


def test_a_reward_spread_by_score_keeps_its_sum_and_pays_kl_once():
    made = built(credit=CreditConfig(rule="uniform", entry="reward"), gae_lambda=1.0, kl_weight=0.1)
    # 1/4, 3/4, 0 of the first verdict; the second has no score and stands at its end
    close(made.returns, [[0.85, 0.65, -0.1], [0.05, 0.05, 0], [1, 0, 0], [-0.2, -0.2, -0.2]])
    penalty = built(credit=CreditConfig(rule="uniform", entry="reward"), gae_lambda=1.0, missing_eos_penalty=1.0)
    close(penalty.returns, [[1, 0.75, 0], [0, 0, 0], [1, 0, 0], [-1, -0.5, -0.5]])


def test_a_potential_pays_for_score_collected_and_takes_it_back():
    made = built(credit=CreditConfig(rule="uniform", entry="potential", potential_scale=2.0), gae_lambda=1.0)
    # potentials 0, 0.5, 2 of the first response, 0, 1, 1 of the last
    close(made.returns, [[1, 0.5, -1], [0, 0, 0], [1, 0, 0], [0, -1, -1]])


def test_problems_whose_responses_all_earn_the_same_are_counted():
    assert zero_variance_share(rollout()) == 0.0
    assert zero_variance_share(replace(rollout(), rewards=torch.tensor([1.0, 1.0, 1.0, 0.0]))) == 0.5
    assert zero_variance_share(replace(rollout(), rewards=torch.ones(4))) == 1.0
    assert zero_variance_share(replace(rollout(), groups=torch.tensor([5, 6, 6, 5]))) == 0.0


def test_what_an_update_learns_from_is_detached():
    made = built(gae_lambda=1.0)
    for tensor in (made.advantages, made.returns, made.policy_weights):
        assert tensor is not None
        assert not tensor.requires_grad


def test_variance_is_that_of_the_rewards_the_advantages_see():
    """Equal rewards of the task are not equal after a penalty, and may become equal by one."""
    config = PPOConfig(advantage="group", missing_eos_penalty=1.0)
    scores = TokenScores(LOGPROBS, -LOGPROBS, REFERENCE)
    for rewards, kl_weight, share in (
        ([1.0, 1.0, 1.0, 1.0], 0.0, 0.5),
        ([1.0, 1.0, 0.0, 1.0], 0.0, 1.0),
        ([1.0, 1.0, 0.0, 1.0], 0.1, 0.0),
    ):
        responses = replace(rollout(), rewards=torch.tensor(rewards))
        compared = compared_rewards(responses, scores, config, kl_weight=kl_weight)
        assert zero_variance_share(replace(responses, rewards=compared)) == share
        made = built(responses, kl_weight=kl_weight, advantage="group", missing_eos_penalty=1.0)
        idle = [not made.advantages[rows].any() for rows in ([0, 1], [2, 3])]
        assert sum(idle) / 2 == share


def test_the_sampling_correction_weighs_tokens_by_their_capped_ratio():
    sampled = LOGPROBS - torch.tensor([[0.0, 0.5, -0.5], [9.0, 0.0, 3.0], [0.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    responses = replace(rollout(), sampled_logprobs=sampled)
    credit = CreditConfig(rule="flow")
    plain = built(responses, advantage="group", credit=credit)
    corrected = built(responses, advantage="group", credit=credit, sampling_correction=2.0)
    ratio = [[1, math.exp(0.5), math.exp(-0.5)], [2, 1, 1], [1, 1, 1], [1, 1, 1]]
    close(corrected.policy_weights, (plain.policy_weights * torch.tensor(ratio)).tolist())
    close(corrected.advantages, plain.advantages.tolist())
    with pytest.raises(
        ConfigError, match=r"sampling_correction: must be left out for a rollout without .* got 2.0; sam"
    ):
        built(rollout(), sampling_correction=2.0)
