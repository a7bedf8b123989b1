"""The engine-free adapter on tensors made up in verl's form; verl itself is not run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from flowgraph import AttentionRecorder
from rl.config import CreditConfig, LoraConfig, PPOConfig
from rl.credit.scope import after_answer
from rl.credit.scoring import score_rollout
from rl.errors import ConfigError, CreditError, RewardError
from rl.integrations.tensors import (
    attention_recorders,
    read_responses,
    scale_advantages,
    token_credit,
    usable_rule,
)
from rl.policy.actor_critic import ActorCritic
from rl.policy.sampling import Generated
from rl.records import Credit, Responses, TokenScores
from rl.rollouts.rollout import judge
from rl.seeds import generator
from rl.training.experience import build_experience
from tests.fixtures.policies import Digits, alphabet, tiny_policy

DIGITS = Digits()
TOKENIZER = alphabet()
PROMPTS = [DIGITS.prompts[number] for number in (0, 0, 1, 1)]
COMPLETIONS = ["a=1;b=4", "b;2", "7", "cc+c;d=8"]
GROUPS = torch.tensor([0, 0, 1, 1])
END, PAD = 1, 0


def made_up() -> dict[str, torch.Tensor]:
    """Prompts on the right of their columns, responses on the left of theirs; the last one never ended."""
    prompts = [TOKENIZER(prompt)["input_ids"] for prompt in PROMPTS]
    responses = [TOKENIZER(text)["input_ids"] + [END] for text in COMPLETIONS]
    responses[-1].pop()
    P, R = max(map(len, prompts)), max(map(len, responses)) + 2
    left = torch.tensor([[PAD] * (P - len(ids)) + ids for ids in prompts])
    right = torch.tensor([ids + [PAD] * (R - len(ids)) for ids in responses])
    mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) + [1] * len(r) + [0] * (R - len(r))
                         for p, r in zip(prompts, responses, strict=True)])  # fmt: skip
    return {"prompts": left, "responses": right, "attention_mask": mask, "response_mask": mask[:, P:]}


def read(batch: dict[str, torch.Tensor], **arguments: Any) -> Responses:
    arguments = {"find_answer": DIGITS.find_answer, "groups": GROUPS, **arguments}
    return read_responses(batch, arguments.pop("prompts", PROMPTS), TOKENIZER, **arguments)


def test_a_batch_is_read_token_by_token():
    batch = made_up()
    responses = read(batch, rewards=torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert responses.completions == tuple(COMPLETIONS)
    assert responses.truncated.tolist() == [False, False, False, True]
    assert responses.groups.tolist() == GROUPS.tolist()
    assert responses.rewards.tolist() == [1.0, 1.0, 0.0, 1.0]
    assert torch.equal(responses.response_mask, batch["response_mask"].bool())
    for row, text in enumerate(COMPLETIONS):
        place = DIGITS.find_answer(text)
        assert place is not None
        assert responses.answer_in_response[row].nonzero().flatten().tolist() == [place[0]]
        asked = responses.input_ids[row][responses.question[row]].tolist()
        assert TOKENIZER.decode(asked) == PROMPTS[row]


def test_credited_advantages_are_those_of_our_own_trainer():
    """Attention recorded by hand, as a worker would, and made up rewards of verl's own."""
    credit = CreditConfig(rule="flow_entropy", shape="soft", sign="non_negative", mean_one=True)
    responses = read(made_up(), rewards=torch.tensor([1.0, 0.0, 0.0, 2.0]))
    policy = ActorCritic(tiny_policy(), LoraConfig(), critic=False)
    scored = score_rollout(
        policy, responses, credit, temperature=1.0, micro_batch_size=2, seed=0, step=0, reference=False
    )
    config = PPOConfig(advantage="group", num_prompts=2, group_size=2, credit=credit)
    experience = build_experience(responses, scored.scores, scored.credit, config, kl_weight=0.0)

    model = tiny_policy()
    with torch.no_grad(), AttentionRecorder(model, layers=credit.layers, heads=credit.heads) as recorder:
        model(input_ids=responses.input_ids, attention_mask=responses.attention_mask.long(), use_cache=False)
    rows = {name: recorder.rows(responses.attention_mask) for name in usable_rule(credit).needs}
    found = token_credit(responses, scored.scores, credit, rows=rows)
    ours = scale_advantages(experience.advantages, responses.response_mask, found, credit)
    torch.testing.assert_close(ours, experience.advantages * experience.policy_weights, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours, experience.advantages, atol=1e-2)


@pytest.mark.parametrize("rule", ["flow_sharp", "reach_sharp", "position_matched"])
def test_sharp_credit_with_a_fallback_is_that_of_our_own_trainer(rule):
    """The recorders that a worker makes, in its own pass."""
    credit = CreditConfig(rule=rule, shape="soft", floor=0.5, ceiling=2.0, fallback=0.9, normalize="sum_of_squares")
    responses = read(made_up(), rewards=torch.tensor([1.0, 0.0, 0.0, 2.0]))
    policy = ActorCritic(tiny_policy(), LoraConfig(), critic=False)
    scored = score_rollout(
        policy, responses, credit, temperature=1.0, micro_batch_size=1, seed=0, step=0, reference=False
    )
    model = tiny_policy()
    recorders = attention_recorders(model, credit)
    with torch.no_grad(), ExitStack() as stack:
        for recorder in recorders.values():
            stack.enter_context(recorder)
        model(input_ids=responses.input_ids, attention_mask=responses.attention_mask.long(), use_cache=False)
    rows = {name: recorder.rows(responses.attention_mask) for name, recorder in recorders.items()}
    random = [generator(0, "credit positions", 0, 0)] * 4
    found = token_credit(responses, scored.scores, credit, rows=rows, random=random)
    torch.testing.assert_close(found.weights, scored.credit.weights, rtol=1e-4, atol=1e-5)
    assert found.unanchored is not None
    assert torch.equal(found.unanchored, scored.credit.unanchored)
    assert 0 < int(found.unanchored.sum()) < 4
    assert (found.weights != 1).any()
    assert attention_recorders(model, CreditConfig(rule="entropy")) == {}


@pytest.mark.parametrize("scope", ["reasoning", "response"])
def test_advantages_after_the_answer_stay_as_they_are(scope):
    responses = read(made_up())
    after = after_answer(responses)
    assert after.sum(1).tolist() == [1, 1, 1, 0]  # the end tokens of the first three
    zeros = torch.zeros(responses.response_mask.shape)
    entropy = torch.rand(zeros.shape, generator=torch.Generator().manual_seed(0)).masked_fill(after, 0.0)
    credit = CreditConfig(rule="entropy", shape="soft", scope=scope, mean_one=True)
    found = token_credit(responses, TokenScores(zeros, entropy), credit)
    scaled = scale_advantages(torch.full((4,), 2.0), responses.response_mask, found, credit)
    assert (scaled[after] == 2).all()
    assert (scaled[responses.response_mask] != 2).any()


def test_uniform_credit_changes_nothing():
    responses = read(made_up())
    advantages = torch.randn(responses.response_mask.shape, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros_like(advantages)
    found = token_credit(responses, TokenScores(zeros, zeros), CreditConfig(rule="uniform"))
    scaled = scale_advantages(advantages, responses.response_mask, found, CreditConfig(rule="uniform"))
    assert torch.equal(scaled, advantages)


def test_draws_belong_to_the_sequence():
    responses = read(made_up())
    zeros = torch.zeros(responses.response_mask.shape)
    credit = CreditConfig(rule="random", scope="response")

    def weights(*places: int) -> torch.Tensor:
        random = [generator(0, "credit", place) for place in places]
        return token_credit(responses, TokenScores(zeros, zeros), credit, random=random).scores

    assert torch.equal(weights(0, 1, 2, 3), weights(0, 1, 2, 3))
    assert not torch.equal(weights(0, 1, 2, 3), weights(4, 5, 6, 7))


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_advantages_of_either_shape_are_scaled(shape):
    mask = torch.tensor([[True, True, False], [True, True, True]])
    weights = torch.tensor([[2.0, 1.0, 1.0], [1.0, 3.0, 1.0]])
    credit = Credit(torch.zeros(2, 3), mask, weights)
    advantages = torch.tensor([1.0, -2.0])
    if len(shape) == 2:
        advantages = advantages[:, None].expand(shape)
    scaled = scale_advantages(advantages, mask, credit, CreditConfig())
    assert scaled.tolist() == [[2.0, 1.0, 1.0], [-2.0, -6.0, -2.0]]
    positive = scale_advantages(advantages, mask, credit, CreditConfig(sign="non_negative"))
    assert positive.tolist() == [[2.0, 1.0, 1.0], [-2.0, -2.0, -2.0]]
    levelled = scale_advantages(advantages, mask, credit, CreditConfig(mean_one=True))
    torch.testing.assert_close((levelled * mask).sum(1), advantages.reshape(2, -1)[:, 0] * mask.sum(1))


def without(batch, key):
    return {name: value for name, value in batch.items() if name != key}


def gap(batch):
    """A tool's output within the response: attended, and not the policy's."""
    mask = batch["response_mask"].clone()
    mask[0, 2] = 0
    return {**batch, "response_mask": mask}


def emptied(batch):
    mask, whole = batch["response_mask"].clone(), batch["attention_mask"].clone()
    mask[1] = 0
    whole[1, -mask.shape[1] :] = 0
    return {**batch, "response_mask": mask, "attention_mask": whole}


def holed(batch):
    mask, whole = batch["response_mask"].clone(), batch["attention_mask"].clone()
    mask[0, 2] = whole[0, 2 - mask.shape[1]] = 0
    return {**batch, "response_mask": mask, "attention_mask": whole}


def padded_on_the_right(batch):
    whole = batch["attention_mask"].clone()
    whole[0, batch["prompts"].shape[1] - 1] = 0
    return {**batch, "attention_mask": whole}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda b: without(b, "response_mask"), "batch: must hold prompts.*got none of the name 'response_mask'"),
        (lambda b: {**b, "responses": b["responses"][:2]}, r"responses: must have shape \(4, 10\), got \(2, 10\)"),
        (lambda b: {**b, "attention_mask": b["response_mask"]}, r"attention_mask: must have shape \(4, 20\)"),
        (padded_on_the_right, "attention_mask: must have the padding of prompts on the left"),
        (gap, "response_mask: must be the attention mask of the response"),
        (holed, "mask: must be True on one run of tokens"),
        (emptied, "response_mask: must hold a token of every response, got none of response 1"),
        (
            lambda b: {**b, "prompts": b["prompts"].masked_fill(b["prompts"] == 3, 4)},
            "prompts: must be the text of the ids of",
        ),
    ],
)
def test_batches_of_another_form_are_refused(change, text):
    with pytest.raises(ConfigError, match=text):
        read(change(made_up()))


def test_other_wrong_input_is_refused():
    responses = read(made_up())
    zeros = torch.zeros(responses.response_mask.shape)
    wide = torch.zeros(responses.input_ids.shape)
    with pytest.raises(ConfigError, match=r"scores: must have shape \(4, 10\) like response_mask, got \(4, 20\)"):
        token_credit(responses, TokenScores(wide, wide), CreditConfig(rule="entropy"))
    with pytest.raises(CreditError, match=r"rows: must hold the attention 'attention'.*got \[\]"):
        token_credit(responses, TokenScores(zeros, zeros), CreditConfig(rule="flow"))
    with pytest.raises(ConfigError, match=r"credit.entry: must be 'advantage' in another trainer.*got 'reward'"):
        usable_rule(CreditConfig(entry="reward"))
    with pytest.raises(CreditError, match=r"got 'gradient', which needs a backward pass of its own; use another rule"):
        usable_rule(CreditConfig(rule="gradient"))
    with pytest.raises(RewardError, match="got ZeroDivisionError"):
        read(made_up(), find_answer=lambda completion: (1 // 0, 1))


def test_reading_is_what_our_own_rollout_does():
    responses, batch = read(made_up()), made_up()
    generated = Generated(
        torch.cat([batch["prompts"], batch["responses"]], 1), batch["attention_mask"].bool(), batch["prompts"].shape[1],
        batch["response_mask"].bool(), torch.tensor([False, False, False, True]),
    )  # fmt: skip
    ours = judge(DIGITS, TOKENIZER, [DIGITS.sample("train", number) for number in (0, 0, 1, 1)], generated)
    assert torch.equal(responses.question, ours.question)
    assert torch.equal(responses.answer, ours.answer)
    assert torch.equal(responses.truncated, ours.truncated)
