"""The old-policy pass: plain log-probabilities, credit that costs no pass of its own, nothing left behind."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from rl import (
    ActorCritic,
    AttentionNeed,
    CreditConfig,
    CreditError,
    CreditInput,
    LoraConfig,
    Responses,
    credit_rule,
    rule_names,
)
from rl.credit.registry import find_rule
from rl.credit.scope import after_answer, tokens_in_scope
from rl.credit.scoring import Scored, embedding_gradient, score_rollout
from rl.policy.actor_critic import ModelInput
from rl.rollouts.rollout import PromptEncoder, judge, sample_responses
from tests.fixtures.policies import FAMILIES, Digits, alphabet, tiny_policy

BUILT_IN = [
    name
    for name in rule_names()
    if not name.startswith("test_") and find_rule(name).function.__module__.startswith("rl.")
]
READERS = [name for name in BUILT_IN if find_rule(name).needs]
EXTRA_PASSES = {
    "gradient": 1, "relevance": 1, "vtrace": 1, "grail": 1, "delta": 1, "oar_gradient": 2, "lora_influence": 2,
}  # fmt: skip


@credit_rule("test_scoring_breaks", needs={"rows": AttentionNeed()})
def breaks(batch: CreditInput) -> Tensor:
    """A rule with a fault of its own."""
    raise ZeroDivisionError("mine")


@credit_rule("test_scoring_negative", needs={"rows": AttentionNeed()})
def negative(batch: CreditInput) -> Tensor:
    """Scores that are none."""
    return -torch.ones(batch.scored.shape)


def actor(family: str = "llama", *, critic: bool = True) -> ActorCritic:
    """A policy whose adapters are no longer the zero that they start from."""
    policy = ActorCritic(tiny_policy(family), LoraConfig(rank=2), critic=critic)
    torch.manual_seed(1)
    for parameter in (policy.policy_parameters() | policy.value_parameters()).values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return policy


def rollout(policy: ActorCritic) -> Responses:
    """Six responses of different lengths to prompts of different lengths."""
    tokenizer, task = alphabet(), Digits()
    encoder = PromptEncoder(tokenizer, policy.causal_lm, 100, 10)
    samples = [task.sample("train", index) for index in range(3)]
    generated = sample_responses(
        policy.causal_lm, encoder, samples, group_size=2, max_response_tokens=10, temperature=1.0, seed=3, step=0
    )
    return judge(task, tokenizer, [sample for sample in samples for _ in range(2)], generated)


def scored(policy: ActorCritic, responses: Responses, credit: CreditConfig | str = "uniform", **settings) -> Scored:
    credit = CreditConfig(rule=credit) if isinstance(credit, str) else credit
    settings = {"temperature": 1.0, "micro_batch_size": 6, "seed": 0, "step": 0, "reference": False} | settings
    return score_rollout(policy, responses, credit, **settings)


def num_hooks(policy: ActorCritic) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in policy.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_a_plain_forward_pass(family: str, temperature: float):
    policy = actor(family)
    responses = rollout(policy)
    scores = scored(policy, responses, temperature=temperature, reference=True).scores
    assert scores.ref_logprobs is not None
    assert scores.values is not None
    assert scores.final_values is not None
    assert policy.value_head is not None
    P = responses.prompt_length
    for row in range(responses.num_sequences):
        ids = responses.input_ids[row][responses.attention_mask[row]][None]
        start = int(responses.attention_mask[row, :P].sum())
        length = ids.shape[1] - start
        with torch.no_grad():
            logits = policy.causal_lm(ids).logits[0] / temperature
            with policy.adapter(None):
                reference = policy.causal_lm(ids).logits[0] / temperature
            with policy.adapter("value"):
                hidden = policy.causal_lm.get_decoder()(ids).last_hidden_state[0]
            values = policy.value_head(hidden)[start - 1 :, 0]
        for got, expected in ((scores.logprobs, logits), (scores.ref_logprobs, reference)):
            plain = expected.log_softmax(-1)[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]
            torch.testing.assert_close(got[row, :length], plain, atol=2e-5, rtol=1e-4)
            assert not got[row, length:].any()
        probabilities = logits.softmax(-1)[start - 1 : -1]
        entropy = -(probabilities * probabilities.log()).nan_to_num().sum(-1)
        torch.testing.assert_close(scores.entropy[row, :length], entropy, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(scores.values[row, :length], values[:-1], atol=2e-5, rtol=1e-4)
        if length == responses.response_length:
            torch.testing.assert_close(scores.final_values[row], values[-1], atol=2e-5, rtol=1e-4)


def test_what_is_not_asked_for_is_not_computed():
    policy = actor(critic=False)
    scores = scored(policy, rollout(policy)).scores
    assert scores.ref_logprobs is None
    assert scores.values is None
    assert scores.final_values is None


class Calls:
    """Forward passes through the first layer, whichever adapter is on."""

    def __init__(self, policy: ActorCritic, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        layer = policy.causal_lm.model.layers[0]
        forward = layer.forward

        def counted(*arguments, **named):
            self.count += 1
            return forward(*arguments, **named)

        monkeypatch.setattr(layer, "forward", counted)


@pytest.mark.parametrize("rule", BUILT_IN)
def test_credit_needs_no_forward_pass_of_its_own(rule: str, monkeypatch: pytest.MonkeyPatch):
    policy = actor()
    responses = rollout(policy)
    calls = Calls(policy, monkeypatch)
    scored(policy, responses, rule, micro_batch_size=4, reference=True)
    # Policy, critic, reference, and what a rule asks for.
    passes = 3 + EXTRA_PASSES.get(rule, 0)
    assert calls.count == 2 * passes
    assert bool(find_rule(rule).own_pass) == (rule in EXTRA_PASSES)


@pytest.mark.parametrize("rule", [rule for rule in BUILT_IN if rule not in EXTRA_PASSES or rule == "gradient"])
def test_cutting_the_batch_changes_neither_scores_nor_weights(rule: str):
    policy = actor()
    responses = rollout(policy)
    credit = CreditConfig(rule=rule, shape="soft")
    whole = scored(policy, responses, credit, reference=True)
    for size in (1, 4):
        cut = scored(policy, responses, credit, micro_batch_size=size, reference=True)
        for record, other in ((whole.scores, cut.scores), (whole.credit, cut.credit)):
            for item in fields(record):
                torch.testing.assert_close(
                    getattr(other, item.name), getattr(record, item.name), atol=2e-5, rtol=2e-4, msg=item.name
                )


def test_the_scope_leaves_the_answer_out_unless_told_otherwise():
    policy = actor()
    responses = rollout(policy)
    assert responses.answer_in_response.any()
    expected = responses.response_mask & ~after_answer(responses)
    assert torch.equal(tokens_in_scope(responses, "response"), expected)
    expected = expected & ~responses.answer_in_response
    assert torch.equal(tokens_in_scope(responses, "reasoning"), expected)
    for scope in ("reasoning", "response"):
        credit = scored(policy, responses, CreditConfig(rule="entropy", scope=scope, strength=3.0)).credit
        assert torch.equal(credit.scored, tokens_in_scope(responses, scope))
        assert (credit.weights[~credit.scored] == 1).all()
        assert not credit.scores[~credit.scored].any()
        assert set(credit.weights.unique().tolist()) == {1.0, 3.0}


@pytest.mark.parametrize("rule", READERS)
def test_recorders_leave_nothing_behind(rule: str):
    policy = actor()
    responses = rollout(policy)
    implementation, hooks = policy.causal_lm.config._attn_implementation, num_hooks(policy)
    before = scored(policy, responses).scores.logprobs
    scored(policy, responses, rule)
    assert policy.causal_lm.config._attn_implementation == implementation
    assert num_hooks(policy) == hooks
    assert torch.equal(scored(policy, responses).scores.logprobs, before)


@pytest.mark.parametrize("fault", ["rule", "scores", "forward"])
def test_an_exception_leaves_nothing_behind(fault: str, monkeypatch: pytest.MonkeyPatch):
    policy = actor()
    responses = rollout(policy)
    implementation, hooks = policy.causal_lm.config._attn_implementation, num_hooks(policy)
    trained = Counter(parameter.requires_grad for parameter in policy.parameters())
    before = scored(policy, responses, reference=True).scores
    if fault == "forward":
        with monkeypatch.context() as patched:
            norm = policy.causal_lm.model.norm
            patched.setattr(norm, "forward", lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                scored(policy, responses, "flow")
    elif fault == "rule":
        with pytest.raises((ZeroDivisionError, CreditError)):
            scored(policy, responses, "test_scoring_breaks")
    else:
        message = r"credit: rule 'test_scoring_negative' must return finite scores of at least 0, got -1.0 for token 0"
        with pytest.raises(CreditError, match=message):
            scored(policy, responses, "test_scoring_negative")
    assert policy.causal_lm.config._attn_implementation == implementation
    assert num_hooks(policy) == hooks
    assert policy.peft.active_adapter == policy.policy_name
    assert Counter(parameter.requires_grad for parameter in policy.parameters()) == trained
    after = scored(policy, responses, reference=True).scores
    assert torch.equal(after.logprobs, before.logprobs)
    assert torch.equal(scored(policy, responses, "flow").scores.logprobs, before.logprobs)


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_leaves_no_gradients(family: str):
    policy = actor(family)
    responses = rollout(policy)
    made = scored(policy, responses, "gradient")
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert not made.scores.logprobs.requires_grad
    assert not made.credit.weights.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedding_gradient_is_the_numerical_derivative(family: str):
    policy = actor(family).double()
    responses = rollout(policy).select([1, 4])
    norms = embedding_gradient(policy, responses, 1.7)
    inputs = ModelInput.of(responses, policy.device)
    P, tokens = responses.prompt_length, responses.input_ids[:, responses.prompt_length :]
    start = policy.embeddings(inputs)

    def likelihood(embeddings: Tensor) -> Tensor:
        with torch.no_grad():
            logprobs = policy.logprobs_of_embeddings(embeddings, inputs, tokens, 1.7)
        return logprobs.double().masked_fill(~responses.response_mask, 0.0).sum(1)

    for row, column in ((0, 0), (1, 1)):
        gradient = torch.zeros(start.shape[2], dtype=torch.float64)
        for dimension in range(start.shape[2]):
            ends = []
            for sign in (1, -1):
                moved = start.clone()
                moved[row, P + column, dimension] += sign * 1e-3
                ends.append(likelihood(moved)[row])
            gradient[dimension] = (ends[0] - ends[1]) / 2e-3
        assert float(norms[row, column]) == pytest.approx(float(gradient.norm()), rel=2e-2)
        assert float(gradient.norm()) > 1e-3
    assert not norms[~responses.response_mask].any()
    last = responses.response_mask.sum(1) - 1
    assert all(float(norms[row, column]) == 0.0 for row, column in enumerate(last.tolist())), "nothing follows the last"


def test_the_cost_of_credit_is_part_of_the_whole():
    policy = actor()
    responses = rollout(policy)
    began = time.perf_counter()
    made = scored(policy, responses, "flow")
    assert 0 < made.credit_seconds < time.perf_counter() - began


def test_the_pass_is_kept_only_on_request_and_only_whole():
    policy = actor()
    responses = rollout(policy)
    assert scored(policy, responses, "flow").output is None
    assert scored(policy, responses, "flow", micro_batch_size=4, keep_graph=True).output is None
    kept = scored(policy, responses, "flow", keep_graph=True)
    assert kept.output is not None
    assert kept.output.logprobs.requires_grad
    records = (*vars(kept.scores).values(), *vars(kept.credit).values())
    assert not any(tensor.requires_grad for tensor in records if isinstance(tensor, Tensor))


def test_rules_that_draw_do_so_by_problem_and_step():
    policy = actor()
    responses = rollout(policy)
    draws = [
        scored(policy, responses, "random", seed=seed, step=step).credit.scores
        for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    part = scored(policy, responses.select([2, 3]), "random").credit.scores
    assert torch.equal(part, draws[0][2:4])
    weights = scored(policy, replace(responses, groups=responses.groups + 1), "random").credit.scores
    assert not torch.equal(weights, draws[0])
