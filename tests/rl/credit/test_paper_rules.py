"""Rules of papers against their formulas, computed anew from a plain model, and their behaviour in a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgraph import EdgeRules, capture, composed_scores
from rl import ActorCritic, CreditConfig, CreditError, CreditInput, PolicyError, Responses, TokenScores
from rl.credit.paper_rules import outcome_advantages
from rl.credit.policy_passes import PolicyPasses
from rl.credit.ratings import check_credit
from rl.credit.registry import find_rule, score_tokens
from rl.credit.scope import before_answer, tokens_in_scope
from rl.credit.weights import loss_weights
from rl.integrations.tensors import usable_rule
from rl.policy.actor_critic import ModelInput
from tests.rl.credit.test_scoring import actor, rollout, scored

OWN_PASS = ("relevance", "vtrace", "grail", "oar_gradient", "delta", "lora_influence")
WEIGHING = ("grail", "oar_gradient", "delta", "taco", "lora_influence")
ALL = (*OWN_PASS, "taco", "attention_entropy")


def mixed(policy: ActorCritic) -> Responses:
    """Responses with right and wrong ones in every group, so that all have an advantage, and answers of some."""
    responses = rollout(policy)
    return replace(responses, rewards=torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0]))


def sequence(responses: Responses, row: int) -> tuple[Tensor, int, Tensor]:
    """The ids of a response without padding, the index of its first response token, and the answer's indices."""
    real = responses.attention_mask[row]
    start = int(real[: responses.prompt_length].sum())
    return responses.input_ids[row][real][None], start, responses.answer[row][real].nonzero().flatten()


def answered(responses: Responses) -> list[int]:
    rows = before_answer(responses).any(1).nonzero().flatten().tolist()
    assert rows
    return rows


# The formulas ----------------------------------------------------------------------------------------------


def saliency_alone(policy: ActorCritic, ids: Tensor, answer: Tensor) -> Tensor:
    """|<dL/dx, x>| of one sequence, from a plain call of the model."""
    embeddings = policy.causal_lm.get_input_embeddings()(ids).detach().requires_grad_(True)
    logits = policy.causal_lm(inputs_embeds=embeddings, use_cache=False).logits[0].log_softmax(-1)
    likelihood = sum(logits[place - 1, ids[0, place]] for place in answer.tolist())
    (gradient,) = torch.autograd.grad(likelihood, embeddings)
    return (gradient * embeddings).sum(-1)[0].abs().detach()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_grail_is_its_formula(family: str):
    policy = actor(family)
    responses = mixed(policy)
    credit = scored(policy, responses, CreditConfig(rule="grail", options={"strength": 0.8})).credit
    for row in answered(responses):
        ids, start, answer = sequence(responses, row)
        saliency = saliency_alone(policy, ids, answer)[start:]
        chosen = credit.scored[row, : len(saliency)]
        values = saliency[chosen].double()
        z = (values - values.mean()) / values.std(correction=0)
        expected = (1 + 0.8 * z).clamp(0.5, 5).float()
        torch.testing.assert_close(credit.weights[row, credit.scored[row]], expected, atol=1e-3, rtol=1e-3)


def test_grail_weighs_wrong_responses_only():
    policy = actor()
    responses = mixed(policy)
    settings = CreditConfig(rule="grail")
    credit = scored(policy, responses, settings).credit
    advantages = outcome_advantages(responses)[:, None].expand(responses.response_mask.shape)
    used = loss_weights(credit, advantages, responses.response_mask, settings)
    right = responses.rewards == 1
    assert (used[right] == 1).all()
    assert torch.equal(used[~right], credit.weights[~right])
    assert (used[~right] != 1).any()
    # A sign of one's own has precedence over that of the paper.
    everywhere = loss_weights(credit, advantages, responses.response_mask, replace(settings, sign="all"))
    assert torch.equal(everywhere, credit.weights)


def test_oar_shrinks_low_tokens_boosts_high_ones_and_keeps_the_sum():
    policy = actor()
    responses = mixed(policy)
    credit = scored(policy, responses, "oar_gradient").credit
    for row in answered(responses):
        chosen = credit.scored[row]
        weights = credit.weights[row, chosen]
        assert float(weights.sum()) == pytest.approx(int(chosen.sum()), rel=1e-5)
        if len(weights) > 2:
            assert float(weights.max()) > 1 > float(weights.min()) > 0


def test_oar_worked_by_hand():
    """Sensitivities e^m - 1 give m; q = .25 is the 0.4 quantile of 0, .25, .25, 1 by linear interpolation."""

    class Passes(PolicyPasses):
        def __init__(self) -> None:
            pass

        def outcome_sensitivity(self, chosen: Tensor, random: Any, noise: float) -> Tensor:
            return torch.tensor([[0.0, 0.25, 0.25, 1.0, 0.0]]).expm1()

    policy = actor()
    responses = rollout(policy).select([0])
    mask = torch.ones(1, 5, dtype=torch.bool)
    answer = torch.zeros(1, responses.prompt_length + 5, dtype=torch.bool)
    answer[0, -1] = True
    responses = replace(
        responses, response_mask=mask, answer=answer,
        input_ids=torch.ones(answer.shape, dtype=torch.int64), attention_mask=torch.ones_like(answer),
        question=torch.zeros_like(answer), sampled_logprobs=None, oracle=None,
    )  # fmt: skip
    batch = CreditInput(
        responses, TokenScores(torch.zeros(1, 5), torch.zeros(1, 5)), tokens_in_scope(responses, "reasoning"),
        random=[torch.Generator()], passes=Passes(),
    )  # fmt: skip
    found = score_tokens(find_rule("oar_gradient"), batch)[0, :4]
    # The quantile of rank .4 * 3 = 1.2 lies between the two .25.
    raw = torch.tensor([0.1, 1.0, 1.0, 3.0])
    torch.testing.assert_close(found, raw * 4 / raw.sum(), atol=1e-5, rtol=1e-5)


def test_delta_is_its_formula():
    policy = actor()
    responses = mixed(policy)
    credit = scored(policy, responses, CreditConfig(rule="delta", options={"range": 0.9})).credit
    advantages = outcome_advantages(responses)
    vectors: dict[tuple[int, int], Tensor] = {}
    for row in range(responses.num_sequences):
        ids, start, _ = sequence(responses, row)
        with torch.no_grad():
            hidden = policy.causal_lm.get_decoder()(ids).last_hidden_state[0]
            logprobs = policy.causal_lm(ids).logits[0].log_softmax(-1)
        for column in credit.scored[row].nonzero().flatten().tolist():
            place = start + column
            probability = logprobs[place - 1, ids[0, place]].exp()
            vectors[row, column] = ((1 - probability) * hidden[place - 1]).double()

    def centroid(sign: int) -> Tensor:
        side = [(row, key) for key in vectors for row in [key[0]] if float(advantages[row]) * sign > 0]
        total = torch.stack([abs(float(advantages[row])) * vectors[key] for row, key in side]).sum(0)
        return total / sum(abs(float(advantages[row])) for row, _ in side)

    positive, negative = centroid(1), centroid(-1)
    margins = {}
    for (row, column), vector in vectors.items():
        difference = float((vector - negative).square().sum() - (vector - positive).square().sum())
        margins[row, column] = difference if float(advantages[row]) > 0 else -difference
    scale = (sum(margin**2 for margin in margins.values()) / len(margins)) ** 0.5
    for key, margin in margins.items():
        expected = min(1.9, max(0.1, 2 / (1 + 2.718281828459045 ** (-margin / scale))))
        assert float(credit.weights[key]) == pytest.approx(expected, abs=2e-3)


def test_delta_needs_two_sides():
    policy = actor()
    responses = replace(rollout(policy), rewards=torch.ones(6))
    for rule in ("delta", "lora_influence"):
        assert (scored(policy, responses, rule).credit.weights == 1).all()


def test_taco_worked_by_hand():
    """alpha e^-H = .1 * .5: a token of probability .05 is at the limit, one of .005 is e^2.3 below it."""
    policy = actor()
    responses = rollout(policy).select([0])
    mask = responses.response_mask
    scores = TokenScores(logprobs=torch.full(mask.shape, 0.005).log(), entropy=torch.full(mask.shape, 2.0).log())
    batch = CreditInput(responses, scores, mask)
    weights = score_tokens(find_rule("taco"), batch)
    torch.testing.assert_close(weights[mask], torch.full((int(mask.sum()),), 1 - 0.5 * (1 - 0.1)))
    likely = replace(batch, scores=replace(scores, logprobs=torch.full(mask.shape, 0.06).log()))
    assert (score_tokens(find_rule("taco"), likely)[mask] == 1).all()
    assert find_rule("taco").sign == "non_negative"


def test_attention_entropy_is_its_formula():
    policy = actor()
    responses = rollout(policy)
    credit = scored(policy, responses, CreditConfig(rule="attention_entropy", layers="all", scope="response")).credit
    rows = capture(policy.causal_lm, responses.input_ids, responses.attention_mask, layers="all").dense()
    for row in range(responses.num_sequences):
        _, start, _ = sequence(responses, row)
        for column in credit.scored[row].nonzero().flatten().tolist():
            weights = rows[row, responses.prompt_length + column]
            weights = weights[weights > 0]
            entropy = -(weights * weights.log()).sum() / torch.tensor(start + column + 1.0).log()
            assert float(credit.scores[row, column]) == pytest.approx(1 - float(entropy), abs=1e-5)


@pytest.mark.parametrize("hops", [0, 2])
def test_relevance_is_what_later_tokens_draw(hops: int):
    policy = actor()
    responses = rollout(policy)
    credit = scored(policy, responses, CreditConfig(rule="relevance", options={"hops": hops})).credit
    for row in answered(responses):
        ids, start, answer = sequence(responses, row)
        marked = torch.zeros(ids.shape, dtype=torch.bool)
        marked[0, answer] = True
        generated = torch.zeros_like(marked)
        generated[0, start:] = True
        options: dict[str, Any] = {"generated": generated, "hops": hops} if hops else {}
        found = capture(policy.causal_lm, ids, capacity="relevance", answer=marked, **options)
        expected = (found.demand.sum().sign() * found.matrix.sum(1)[0, start:]).clamp_min(0)
        chosen = credit.scored[row, : len(expected)]
        assert expected[chosen].any()
        torch.testing.assert_close(
            credit.scores[row, credit.scored[row]], expected[chosen], atol=1e-4 * float(expected.max()), rtol=1e-3
        )


def test_vtrace_is_the_composition_on_the_capacity():
    policy = actor()
    responses = rollout(policy)
    credit = scored(policy, responses, "vtrace").credit
    for row in answered(responses):
        ids, start, answer = sequence(responses, row)
        regions = torch.zeros(2, ids.shape[1], dtype=torch.bool)
        regions[0, answer] = True
        regions[1, start:] = True
        rows = capture(policy.causal_lm, ids, capacity="vtrace").sequence(0)
        real = responses.attention_mask[row]
        found = composed_scores(
            rows, "vtrace", question=responses.question[row][real], answer=regions[0], generated=regions[1],
            rules=EdgeRules(normalization="leak"),
        ).scores[start:].float()  # fmt: skip
        chosen = credit.scored[row, : len(found)]
        assert found[chosen].any()
        torch.testing.assert_close(credit.scores[row, credit.scored[row]], found[chosen], atol=1e-5, rtol=1e-3)
    # The default shape is the rule of the paper: 1.5 on the top 40 %.
    assert set(credit.weights.unique().tolist()) == {1.0, 1.5}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_influence_is_the_inner_product_of_gradients(family: str):
    """Each token's gradient by a backward pass of its own."""
    policy = actor(family)
    responses = mixed(policy)
    advantages = outcome_advantages(responses)
    found = PolicyPasses(policy, responses, 0.8, 4).influence(advantages)
    inputs = ModelInput.of(responses, policy.device)
    tokens = inputs.input_ids[:, responses.prompt_length :]
    parameters = list(policy.policy_parameters().values())
    logprobs, _ = policy.policy_pass(inputs, tokens, 0.8)
    mask = responses.response_mask

    def gradient(value: Tensor) -> Tensor:
        parts = torch.autograd.grad(value, parameters, retain_graph=True)
        return torch.cat([part.flatten() for part in parts]).double()

    mean = gradient((logprobs * advantages[:, None] * mask).sum() / mask.sum())
    for row, column in ((0, 0), (1, 2), (4, 1)):
        assert bool(mask[row, column])
        expected = float(gradient(logprobs[row, column]) @ mean)
        assert float(found[row, column]) == pytest.approx(expected, rel=2e-3, abs=1e-7 * float(mean.norm()))
    assert not found[~mask].any()


def test_a_layer_without_a_forward_derivative_is_named():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(context: Any, *gradients: Tensor) -> Tensor:
            return gradients[0]

    policy = actor()
    norm = policy.causal_lm.model.norm
    norm.register_forward_hook(lambda module, inputs, output: Opaque.apply(output))
    with pytest.raises(
        PolicyError, match=r"model: all layers must have a forward-mode derivative, got LlamaForCausalLM"
    ):
        scored(policy, mixed(policy), "lora_influence")


def test_influence_raises_tokens_that_help():
    policy = actor()
    responses = mixed(policy)
    credit = scored(policy, responses, "lora_influence").credit
    advantages = outcome_advantages(responses)
    z = PolicyPasses(policy, responses, 1.0, 6).influence(advantages)
    helps = (z * advantages[:, None] > 0) & credit.scored
    assert helps.any()
    assert (credit.weights[helps] >= 1).all()
    assert (credit.weights[~helps & credit.scored] <= 1).all()
    assert 0 <= float(credit.weights.min()) < 1 < float(credit.weights.max()) <= 2


# In a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ALL)
def test_micro_batches_padding_and_company_change_nothing(rule: str):
    policy = actor()
    responses = mixed(policy)
    whole = scored(policy, responses, rule).credit
    assert torch.isfinite(whole.weights).all()
    assert (whole.weights[~whole.scored] == 1).all()
    # The divergence under noise is a difference of nearly equal numbers, so its rounding is larger.
    tolerance = 5e-2 if rule == "oar_gradient" else 2e-3
    cut = scored(policy, responses, rule, micro_batch_size=4).credit
    torch.testing.assert_close(cut.weights, whole.weights, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rule", ALL)
def test_without_an_answer_nothing_is_judged_by_it(rule: str):
    policy = actor()
    responses = mixed(policy)
    silent = replace(responses, answer=torch.zeros_like(responses.answer))
    credit = scored(policy, silent, rule).credit
    if rule in ("relevance", "vtrace"):
        assert not credit.scores.any()
    if rule in ("relevance", "vtrace", "grail", "oar_gradient"):
        assert (credit.weights == 1).all()


def test_rules_leave_the_policy_as_it_was():
    policy = actor()
    responses = mixed(policy)
    before = scored(policy, responses).scores.logprobs
    trained = [parameter.requires_grad for parameter in policy.parameters()]
    for rule in OWN_PASS:
        scored(policy, responses, rule)
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert trained == [parameter.requires_grad for parameter in policy.parameters()]
    assert torch.equal(scored(policy, responses).scores.logprobs, before)


# Messages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", OWN_PASS)
def test_engines_that_cannot_run_passes_refuse(rule: str):
    message = rf"credit: must be a rule that another trainer can serve, got {rule!r}, which needs a \w+ pass of its own"
    with pytest.raises(CreditError, match=message):
        usable_rule(CreditConfig(rule=rule))
    with pytest.raises(CreditError, match=message):
        usable_rule(CreditConfig(rule="position_matched", options={"of": rule}))
    responses = rollout(actor())
    batch = CreditInput(
        responses, TokenScores(torch.zeros(responses.response_mask.shape), torch.zeros(responses.response_mask.shape)),
        responses.response_mask, random=[torch.Generator() for _ in range(6)],
    )  # fmt: skip
    with pytest.raises(CreditError, match=r"passes: must be given to a rule that runs passes of the policy, got none"):
        score_tokens(find_rule(rule), batch)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("relevance", {"hops": -1}, r"options: hops must be a whole number of at least 0, got -1; 0 is the default"),
        ("relevance", {"target": "x"}, r"options: must be options of this rule, got 'target'; there are hops"),
        ("vtrace", {"damping": 0}, r"options: damping must be above 0, got 0; 0.5 is the default"),
        ("grail", {"strength": 2}, r"options: strength must be a number in \[0, 1\], got 2; 0.5 is the default"),
        ("oar_gradient", {"boost": 0}, r"options: boost must be a whole number of at least 1, got 0; 2 is"),
        ("delta", {"range": 1.5}, r"options: range must be a number in \[0, 1\], got 1.5; 0.2 is"),
        ("taco", {"alpha": 0}, r"options: alpha must be above 0, got 0; 0.1 is the default"),
        ("attention_entropy", {"power": 2}, r"options: must be options of this rule, got 'power'; there are none"),
        ("lora_influence", {"strength": True}, r"options: strength must be a number in \[0, 1\], got True; 0.5"),
    ],
)
def test_options_are_checked(rule: str, options: dict[str, Any], message: str):
    policy = actor()
    with pytest.raises(CreditError, match=message):
        scored(policy, mixed(policy), CreditConfig(rule=rule, options=options))


def test_a_weighing_rule_must_not_weigh_a_response_with_zeros():
    policy = actor()
    responses = mixed(policy)
    silent = replace(responses, answer=torch.zeros_like(responses.answer))
    for rule in WEIGHING:
        check_credit(CreditConfig(rule=rule))
        assert scored(policy, silent, rule).credit.weights.any(1).all()


def test_weights_that_vanish_in_a_response_are_refused():
    from rl.credit.ratings import Ratings, weigh_tokens

    ratings = Ratings(
        scores=torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        scored=torch.ones(2, 2, dtype=torch.bool),
        tie=None,
        has_tie=torch.ones(2, dtype=torch.bool),
    )
    message = r"credit: rule 'grail' scores in weights, which must not all be 0 in a response, got only 0 in response 1"
    with pytest.raises(CreditError, match=message):
        weigh_tokens(ratings, CreditConfig(rule="grail"))
