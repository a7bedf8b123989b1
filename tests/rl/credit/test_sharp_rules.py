"""Rules on sharpened attention: the rows of the capacity, its flow, and the settings that shape their weights."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgraph import EdgeRules, InvalidInputError, capture, solve_rows
from rl import ActorCritic, ConfigError, Credit, CreditConfig, CreditError, LoraConfig, PPOConfig, PPOTrainer, Responses
from rl.alignment.arms import arm_name, parse_arm
from rl.credit.ratings import Ratings, check_credit, weigh_tokens
from rl.credit.registry import AttentionNeed, applied, find_rule
from rl.credit.scope import before_answer
from rl.credit.weights import annealed, loss_weights, normalized
from tests.fixtures.policies import Digits, alphabet, tiny_policy
from tests.rl.credit.test_scoring import rollout, scored

SHARP = ("flow_sharp", "reach_sharp", "max_attention_sharp", "shuffled_flow_sharp", "wrong_sink")


def actor(family: str = "llama", seed: int = 1) -> ActorCritic:
    """A policy of three layers, whose adapters are no longer the zero that they start from."""
    policy = ActorCritic(tiny_policy(family, layers=3), LoraConfig(rank=2), critic=False)
    torch.manual_seed(seed)
    for parameter in policy.policy_parameters().values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return policy


def captured_flow(policy: ActorCritic, responses: Responses, **options: Any) -> Any:
    """The flow on the capacity of flowgraph, from a pass of its own over the same tokens."""
    rows = capture(policy.causal_lm, responses.input_ids, responses.attention_mask, **options)
    return solve_rows(
        rows, question=responses.question, answer=responses.answer, generated=responses.generated, preset="default"
    )


def in_response(responses: Responses, values: Tensor, credit: Credit) -> Tensor:
    return torch.where(credit.scored, values[:, responses.prompt_length :].float(), 0.0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_scores_are_the_flow_on_the_capacity_sharp_max(family: str):
    """A PEFT model, prompts padded on the left, responses on the right, and three micro-batches."""
    policy = actor(family)
    responses = rollout(policy)
    assert not responses.attention_mask.all()
    flow = captured_flow(policy, responses, capacity="sharp_max")
    for rule, values in (("flow_sharp", flow.throughput), ("reach_sharp", flow.h)):
        credit = scored(policy, responses, CreditConfig(rule=rule), micro_batch_size=2).credit
        expected = in_response(responses, values, credit)
        assert expected.any()
        torch.testing.assert_close(credit.scores, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "capacity"),
    [
        ({"power": 2, "heads": "mean", "layers": "upper", "normalization": "leak"}, {"capacity": "sharp"}),
        (
            {"power": 3, "heads": "mean", "place": "post", "layers": [0], "normalization": "leak"},
            {"capacity": "sharpened", "power": 3, "place": "post", "layers": [0]},
        ),
        (
            {"power": 1, "heads": "max", "layers": 2, "normalization": "leak"},
            {"capacity": "sharpened", "power": 1, "place": "max", "layers": 2},
        ),
    ],
)
def test_options_choose_the_graph(options: dict[str, Any], capacity: dict[str, Any]):
    policy = actor()
    responses = rollout(policy)
    flow = captured_flow(policy, responses, **capacity)
    credit = scored(policy, responses, CreditConfig(rule="flow_sharp", options=options)).credit
    torch.testing.assert_close(credit.scores, in_response(responses, flow.throughput, credit), atol=1e-6, rtol=1e-5)
    plain = scored(policy, responses, "flow_sharp").credit
    assert not torch.allclose(plain.scores, credit.scores, atol=1e-3)


def test_leak_divides_by_the_largest_row_that_can_reach_the_answer():
    """A sharp row after the answer, and that of the first token, must not scale the others down."""
    rows = torch.zeros(1, 6, 6)
    rows[0, 0, 0] = 1.0
    rows[0, 1, 0] = 1.0
    rows[0, 2, 1] = 0.2
    rows[0, 3, 1:3] = torch.tensor([0.1, 0.3])
    rows[0, 4, 2:4] = torch.tensor([0.1, 0.1])
    rows[0, 5, 4] = 1.0
    region = torch.zeros(4, 1, 6, dtype=torch.bool)
    question, answer, generated, _ = region
    question[0, 1] = True
    answer[0, 4] = True
    generated[0, 2:] = True
    rules = EdgeRules(rows="emission", normalization="leak")
    flow = solve_rows(rows, question=question, answer=answer, generated=generated, rules=rules)
    # Token 2 takes row 1, which reads only the excluded first token; token 3 takes row 2, token 4 row 3, the largest.
    scale = 0.4
    assert flow.h[0, 4] == 1
    assert float(flow.h[0, 2]) == pytest.approx(0.3 / scale)
    assert float(flow.h[0, 1]) == pytest.approx(0.1 / scale)


def test_micro_batches_change_neither_scores_nor_the_fallback():
    policy = actor()
    responses = rollout(policy)
    settings = CreditConfig(rule="reach_sharp", shape="soft", floor=0.5, ceiling=2, fallback=1.0)
    whole = scored(policy, responses, settings).credit
    assert whole.unanchored is not None
    assert 0 < int(whole.unanchored.sum()) < responses.num_sequences
    for size in (1, 4):
        cut = scored(policy, responses, settings, micro_batch_size=size).credit
        for item in fields(whole):
            torch.testing.assert_close(getattr(cut, item.name), getattr(whole, item.name), atol=2e-5, rtol=2e-4)


# The fallback ----------------------------------------------------------------------------------------------


def test_the_tie_is_the_mean_reach_of_the_tokens_before_the_answer():
    policy = actor()
    responses = rollout(policy)
    h = captured_flow(policy, responses, capacity="sharp_max").h[:, responses.prompt_length :]
    before = before_answer(responses)
    expected = torch.stack(
        [
            row[chosen].mean() if chosen.any() else torch.zeros((), dtype=h.dtype)
            for row, chosen in zip(h, before, strict=True)
        ]
    )
    for rule in ("flow_sharp", "reach_sharp", "max_attention_sharp"):
        credit = scored(policy, responses, rule).credit
        torch.testing.assert_close(credit.tie, expected.float(), atol=1e-6, rtol=1e-5)
        assert credit.unanchored is not None
        assert not credit.unanchored.any(), "off by default"


def ratings_by_hand() -> Ratings:
    """Ties of 4, 2, .9 and none; the mean of the three is 2.3."""
    return Ratings(
        scores=torch.tensor([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0], [3.0, 1.0]]),
        scored=torch.ones(4, 2, dtype=torch.bool),
        tie=torch.tensor([4.0, 2.0, 0.9, 0.0]),
        has_tie=torch.tensor([True, True, True, False]),
    )


def test_the_fallback_worked_by_hand():
    settings = CreditConfig(rule="reach_sharp", shape="soft", floor=0.25, ceiling=4, fallback=0.5)
    soft = [1.5, 0.5]
    credit = weigh_tokens(ratings_by_hand(), settings)
    assert credit.weights.tolist() == [soft, soft, [1, 1], [1, 1]]
    assert credit.unanchored.tolist() == [False, False, True, True]
    # The mean of all processes is what counts: half of 6 is above 2.
    credit = weigh_tokens(ratings_by_hand(), settings, mean_over_batch=lambda ties: 6.0)
    assert credit.weights.tolist() == [soft, [1, 1], [1, 1], [1, 1]]
    credit = weigh_tokens(ratings_by_hand(), replace(settings, fallback=0.0))
    assert credit.weights.tolist() == [soft] * 4


def test_a_fallback_needs_a_rule_that_measures_reach():
    message = (
        r"credit.fallback: must be 0 with rule 'entropy', which measures no reach, got 0.5; use a rule of the flow"
    )
    with pytest.raises(CreditError, match=message):
        check_credit(CreditConfig(rule="entropy", fallback=0.5))
    config = PPOConfig(steps=1, num_prompts=1, credit=CreditConfig(rule="entropy", fallback=0.5))
    with pytest.raises(CreditError, match=message):
        PPOTrainer(tiny_policy(), alphabet(), task=Digits(), config=config, progress=False)
    for rule in SHARP:
        assert find_rule(rule).ties


# Annealing and normalisation -------------------------------------------------------------------------------


def test_annealing_ends_at_weights_of_one():
    weights = torch.tensor([[2.0, 0.5, 1.0]])
    assert torch.equal(annealed(weights, 0.0, 0.9), weights)
    assert annealed(weights, 0.5, 0.0).tolist() == [[2.0, 0.5, 1.0]]
    assert annealed(weights, 0.5, 0.25).tolist() == [[1.5, 0.75, 1.0]]
    assert annealed(weights, 0.5, 0.5).tolist() == [[1.0, 1.0, 1.0]]
    assert annealed(weights, 0.5, 1.0).tolist() == [[1.0, 1.0, 1.0]]
    with pytest.raises(ConfigError, match=r"progress: must lie in \[0, 1\], got 1.5; it is the share of the run"):
        annealed(weights, 0.5, 1.5)


def test_a_run_anneals_by_its_steps():
    credit = CreditConfig(rule="entropy", shape="soft", floor=0.0, ceiling=8, anneal=0.5)
    config = PPOConfig(
        steps=4, num_prompts=3, group_size=2, max_response_tokens=8, advantage="group", lora=LoraConfig(rank=2),
        credit=credit,
    )  # fmt: skip
    run = PPOTrainer(tiny_policy(), alphabet(), task=Digits(), config=config, progress=False)
    shares = []
    for step in range(4):
        run.position.step = step
        experience = run.collect()
        full = experience.credit.weights - 1
        used = experience.policy_weights - 1
        shares.append(float((used * full).sum() / full.square().sum()))
    assert shares == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("normalize", ["mean", "sum_of_squares"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_normalised_weights_have_the_stated_size(normalize: str, size: float):
    weights = torch.tensor([[1.0, 2.0, 3.0, 7.0], [5.0, 1.0, 1.0, 1.0]]) * size
    scored = torch.tensor([[True, True, True, False], [True, False, False, False]])
    found = normalized(weights, scored, normalize)  # type: ignore[arg-type]
    power = 1 if normalize == "mean" else 2
    for row, chosen in zip(found, scored, strict=True):
        assert float(row[chosen].pow(power).mean()) == pytest.approx(1.0)
    assert torch.equal(found[~scored], weights[~scored])
    assert float(found[0, 2] / found[0, 0]) == pytest.approx(3.0)


def test_mean_one_is_the_normalisation_by_the_mean():
    scored = torch.tensor([[True, True, False]])
    credit = Credit(torch.ones(1, 3), scored, torch.tensor([[3.0, 1.0, 1.0]]))
    mask = torch.ones(1, 3, dtype=torch.bool)
    expected = [[1.5, 0.5, 1.0]]
    for settings in (CreditConfig(mean_one=True), CreditConfig(normalize="mean")):
        assert loss_weights(credit, torch.ones(1, 3), mask, settings).tolist() == expected
    with pytest.raises(ConfigError, match=r"normalize: must be 'none' or 'mean' with mean_one=True, got 'sum_of_squa"):
        CreditConfig(mean_one=True, normalize="sum_of_squares")


def test_weights_that_vanish_cannot_be_normalised():
    weights = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    message = r"weights: must have one above 0 among the scored tokens .*, got none in response 1; use normalize='none'"
    with pytest.raises(CreditError, match=message):
        normalized(weights, torch.ones(2, 2, dtype=torch.bool), "mean")


def test_signs_choose_the_advantages():
    credit = Credit(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[3.0, 3.0]]))
    advantages = torch.tensor([[1.0, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    expected = {
        "rule": [3.0, 3.0],
        "all": [3.0, 3.0],
        "non_negative": [3.0, 1.0],
        "negative": [1.0, 3.0],
        "asymmetric": [3.0, 1 / 3],
    }
    for sign, weights in expected.items():
        found = loss_weights(credit, advantages, mask, CreditConfig(sign=sign))  # type: ignore[arg-type]
        assert found.tolist() == [pytest.approx(weights)], sign


# Settings and messages -------------------------------------------------------------------------------------


def test_the_need_follows_the_options():
    rule = find_rule("flow_sharp")
    assert rule.needs_for({}) == rule.needs == {"sharp": AttentionNeed(layers="1-", power=4.0, place="max")}
    found = rule.needs_for({"power": 2, "heads": "mean", "layers": "all", "place": "post"})
    assert found == {"sharp": AttentionNeed(layers="all", power=2.0, place="post")}


def test_an_arm_names_options_as_text():
    text = "flow_sharp:soft:floor=0.5,ceiling=2,fallback=0.5,options.layers=0,options.heads=mean,options.power=2"
    credit = parse_arm(text)
    assert credit.options == {"layers": 0, "heads": "mean", "power": 2}
    assert parse_arm(arm_name(credit)) == credit
    assert parse_arm("reach_sharp:options.layers=1-").options == {"layers": "1-"}


@pytest.mark.parametrize("rule", SHARP)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 9}, r"options: power must be a number from 1 to 8, got 9; 4 is the default"),
        ({"power": 0.5}, r"options: power must be a number from 1 to 8, got 0.5; 4 is"),
        ({"power": True}, r"options: power must be a number from 1 to 8, got True; 4 is"),
        ({"power": "4"}, r"options: power must be a number from 1 to 8, got '4'; 4 is"),
        ({"power": float("nan")}, r"options: power must be a number from 1 to 8, got nan; 4 is"),
        ({"heads": "min"}, r"options: heads must be 'max' or 'mean', got 'min'; 'max' is the default"),
        ({"place": "max"}, r"options: place must be 'pre' or 'post', got 'max'; 'pre' is the default"),
        ({"normalization": "none"}, r"options: normalization must be 'renormalize' or 'leak', got 'none'; 'renorm"),
        ({"layers": 1.5}, r"options: layers must be text or numbers of layers, got 1.5; '1-' is the default"),
        ({"layers": True}, r"options: layers must be text or numbers of layers, got True; '1-' is"),
        ({"pwer": 2}, r"options: must be options of this rule, got 'pwer'; there are power, heads, layers, place, nor"),
    ],
)
def test_options_are_checked_before_anything_runs(rule: str, options: dict[str, Any], message: str):
    with pytest.raises(CreditError, match=message):
        check_credit(CreditConfig(rule=rule, options=options))


def test_layers_outside_the_model_are_named():
    policy = ActorCritic(tiny_policy(layers=1), LoraConfig(rank=2), critic=False)
    with pytest.raises(InvalidInputError, match=r"layers: must lie in 0..0, got 1..1; indices count"):
        scored(policy, rollout(policy), "flow_sharp")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fallback": -1.0}, r"fallback: must be at least 0, got -1.0; 0.5 is recommended, 0 turns it off"),
        ({"fallback": float("inf")}, r"fallback: must be finite, got inf"),
        ({"anneal": 1.5}, r"anneal: must lie in \[0, 1\], got 1.5; 0.5 is usual, 0 turns it off"),
        ({"normalize": "max"}, r"normalize: must be one of 'none', 'mean', 'sum_of_squares', got 'max'; choose"),
        ({"sign": "positive"}, r"sign: must be one of 'all', 'non_negative', 'negative', 'asymmetric', 'rule', got"),
        ({"anneal": 0.5, "entry": "reward"}, r"anneal: must be 0 with entry='reward', which uses no weights, got 0.5"),
        ({"fallback": 0.5, "entry": "potential"}, r"fallback: must be 0 with entry='potential', which uses no weights"),
    ],
)
@pytest.mark.unchecked
def test_settings_are_checked(settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        CreditConfig(**settings)


# Weights permuted at equal position -------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["entropy", "reach_sharp"])
def test_position_matched_permutes_the_weights_of_each_position(rule: str):
    policy = actor()
    responses = rollout(policy)
    settings = CreditConfig(rule=rule, shape="soft", floor=0.1, fallback=0.8 if rule == "reach_sharp" else 0.0)
    plain = scored(policy, responses, settings).credit
    settings = replace(settings, rule="position_matched", options={"of": rule})
    found = scored(policy, responses, settings).credit
    assert torch.equal(found.scored, plain.scored)
    assert torch.equal(found.weights[~found.scored], plain.weights[~plain.scored])
    moved = 0
    for column in range(responses.response_length):
        among = plain.scored[:, column]
        for name in ("weights", "scores"):
            before = getattr(plain, name)[among, column]
            after = getattr(found, name)[among, column]
            torch.testing.assert_close(after.sort().values, before.sort().values, atol=0, rtol=0)
        moved += int((found.weights[among, column] != plain.weights[among, column]).sum())
    assert moved > 5
    # Weights and scores move together.
    pairs = [
        {(float(s), float(w)) for s, w in zip(of.scores[of.scored], of.weights[of.scored], strict=True)}
        for of in (plain, found)
    ]
    assert pairs[0] == pairs[1]
    cut = scored(policy, responses, settings, micro_batch_size=4).credit
    torch.testing.assert_close(cut.weights, found.weights, atol=2e-5, rtol=2e-4)
    assert not torch.equal(scored(policy, responses, settings, step=1).credit.weights, found.weights)


def test_position_matched_takes_the_options_and_the_sign_of_its_rule():
    settings = CreditConfig(rule="position_matched", options={"of": "reach_sharp", "power": 2})
    assert applied(settings) == CreditConfig(rule="reach_sharp", options={"power": 2})
    assert applied(CreditConfig(rule="position_matched")).rule == "flow_sharp"
    with pytest.raises(CreditError, match=r"options: power must be a number from 1 to 8, got 9"):
        check_credit(replace(settings, options={"of": "reach_sharp", "power": 9}))
    for wrong in ("position_matched", "flux", 3):
        message = rf"options: of must name the rule whose weights are permuted, got {wrong!r}; there are atpo, .*waad"
        with pytest.raises(CreditError, match=message):
            check_credit(replace(settings, options={"of": wrong}))
    with pytest.raises(CreditError, match=r"random: must be given for the rule 'position_matched', got none; pass"):
        weigh_tokens(ratings_by_hand(), CreditConfig(rule="position_matched"))
