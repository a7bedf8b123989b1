"""Which tokens compete for credit: never those after the answer, with any rule, shape and scope."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from rl import ActorCritic, Credit, CreditConfig, LoraConfig, Responses, Sample, rule_names, shape_weights
from rl.config import Scope, Shape, Sign
from rl.credit.ratings import check_credit
from rl.credit.registry import find_rule
from rl.credit.scope import after_answer, answer_openers, before_answer, end_tokens, tokens_in_scope
from rl.credit.scoring import score_rollout
from rl.credit.weights import loss_weights
from rl.errors import CreditError
from rl.rollouts.rollout import PromptEncoder, judge, sample_responses
from tests.fixtures.policies import Digits, UnmarkedDigits, alphabet, tiny_policy

BUILT_IN = [name for name in rule_names() if find_rule(name).function.__module__.startswith("rl.")]


def worked_by_hand() -> Responses:
    """One prompt token, then: reasoning, answer, closing tag, end token; no answer; answer at once."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
    answer = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    prompt = torch.ones(3, 1, dtype=torch.bool)
    return Responses(
        samples=tuple(Sample(index, "p", "a") for index in range(3)),
        completions=("",) * 3,
        input_ids=torch.zeros(3, 7, dtype=torch.int64),
        attention_mask=torch.cat([prompt, mask], 1),
        prompt_length=1,
        response_mask=mask,
        truncated=torch.zeros(3, dtype=torch.bool),
        groups=torch.arange(3),
        rewards=torch.zeros(3),
        question=torch.cat([prompt, torch.zeros_like(mask)], 1),
        answer=torch.cat([~prompt, answer], 1),
    )


def test_openers_and_end_tokens_worked_by_hand():
    responses = replace(worked_by_hand(), truncated=torch.tensor([False, True, False]))
    assert answer_openers(responses).int().tolist() == [
        [0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert end_tokens(responses).int().tolist() == [
        [0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
    ]


def test_scopes_worked_by_hand():
    responses = worked_by_hand()
    assert tokens_in_scope(responses, "reasoning").int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert tokens_in_scope(responses, "response").int().tolist() == [
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
    ]
    assert before_answer(responses).int().tolist() == [[1, 1, 0, 0, 0, 0], [0] * 6, [0] * 6]
    assert after_answer(responses).int().tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6, [0, 1, 0, 0, 0, 0]]


def test_an_answer_in_two_parts_ends_with_the_second():
    responses = worked_by_hand().select([0])
    answer = torch.tensor([[0, 0, 1, 0, 1, 0, 0]]).bool()
    assert tokens_in_scope(replace(responses, answer=answer), "reasoning").int().tolist() == [[1, 0, 1, 0, 0, 0]]
    assert tokens_in_scope(replace(responses, answer=answer), "response").int().tolist() == [[1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize("shape", get_args(Shape))
def test_two_tokens_after_the_answer_keep_weight_1(shape: Shape):
    responses = worked_by_hand().select([0])
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    for scope in get_args(Scope):
        scored = tokens_in_scope(responses, scope)
        weights = shape_weights(scores, scored, CreditConfig(shape=shape, strength=3.0))
        assert weights[0, 4:].tolist() == [1.0, 1.0], scope
    if shape == "soft":
        weights = shape_weights(scores, tokens_in_scope(responses, "reasoning"), CreditConfig(shape="soft"))
        assert weights.tolist() == [[1.5, 0.5, 1.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("scope", get_args(Scope))
@pytest.mark.parametrize("rule", BUILT_IN)
def test_no_rule_judges_tokens_after_the_answer(rule: str, scope: Scope):
    policy = ActorCritic(tiny_policy(), LoraConfig(rank=2), critic=False)
    tokenizer, task = alphabet(), Digits()
    encoder = PromptEncoder(tokenizer, policy.causal_lm, 100, 10)
    samples = [task.sample("train", index) for index in range(3)]
    generated = sample_responses(
        policy.causal_lm, encoder, samples, group_size=2, max_response_tokens=10, temperature=1.0, seed=3, step=0
    )
    responses = judge(task, tokenizer, [sample for sample in samples for _ in range(2)], generated)
    after = after_answer(responses)
    assert after.any()
    for shape in get_args(Shape):
        # Permuted weights of these shapes may all be 0 in a response, and are then not normalised.
        mean_one = rule != "position_matched" or shape not in ("only_top", "raw")
        settings = CreditConfig(rule=rule, shape=shape, scope=scope, strength=3.0, mean_one=mean_one)
        credit = score_rollout(
            policy, responses, settings, temperature=1.0, micro_batch_size=4, seed=0, step=0, reference=False
        ).credit
        assert not credit.scored[after].any()
        assert (credit.weights[after] == 1).all(), shape
        for sign in get_args(Sign):
            advantages = torch.where(responses.rewards[:, None] > 0, 1.0, -1.0).expand(credit.weights.shape)
            weights = loss_weights(credit, advantages, responses.response_mask, replace(settings, sign=sign))
            assert (weights[after] == 1).all(), (shape, sign)


def test_without_an_answer_every_token_competes():
    task = UnmarkedDigits()
    tokenizer, policy = alphabet(), ActorCritic(tiny_policy(), LoraConfig(rank=2), critic=False)
    samples = [task.sample("train", 0)]
    generated = sample_responses(
        policy.causal_lm, PromptEncoder(tokenizer, policy.causal_lm, 100, 10), samples,
        group_size=1, max_response_tokens=10, temperature=1.0, seed=3, step=0,
    )  # fmt: skip
    responses = judge(task, tokenizer, samples, generated)
    for scope in get_args(Scope):
        assert torch.equal(tokens_in_scope(responses, scope), responses.response_mask)


def test_mean_one_is_taken_over_the_tokens_that_compete():
    scored = torch.tensor([[True, True, False, False, False], [False] * 5])
    mask = torch.tensor([[True, True, True, True, False], [True, True, False, False, False]])
    credit = Credit(torch.ones(2, 5), scored, torch.tensor([[3.0, 1.0, 1.0, 1.0, 1.0], [1.0] * 5]))
    weights = loss_weights(credit, torch.ones(2, 5), mask, CreditConfig(mean_one=True))
    assert weights.tolist() == [[1.5, 0.5, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0, 0.0]]
    assert weights.sum(1).tolist() == mask.sum(1).tolist()


def test_permuted_weights_that_may_vanish_are_not_normalised():
    with pytest.raises(
        CreditError, match=r"credit.normalize: must be 'none' with the control 'position_matched' in the"
    ):
        check_credit(CreditConfig(rule="position_matched", shape="only_top", normalize="mean"))
    check_credit(CreditConfig(rule="position_matched", shape="soft", normalize="mean"))
