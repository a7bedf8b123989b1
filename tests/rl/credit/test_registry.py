"""The registry: open to third parties, and strict about what a rule returns."""

import pytest
import torch
from torch import Tensor

from flowgraph import HeadSelector
from rl import AttentionNeed, CreditError, CreditInput, Responses, Sample, TokenScores, credit_rule, rule_names
from rl.credit import registry
from rl.credit.registry import find_rule, score_tokens

OWN = [
    "atpo", "correlation", "coupled", "entropy", "fai", "flow", "flow_entropy", "gradient", "max_attention", "oracle",
    "random", "reach", "reach_entropy", "shuffled_flow", "uniform", "waad",
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules of one test are unknown to the next."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


def two_responses() -> CreditInput:
    """Two prompt tokens, three response tokens; the second response is one token shorter."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    whole = torch.cat([torch.ones(2, 2).bool(), mask], 1)
    nothing = torch.zeros(2, 5).bool()
    responses = Responses(
        samples=(Sample(0, "?", "!"),) * 2,
        completions=("a", "b"),
        input_ids=whole.long(),
        attention_mask=whole,
        prompt_length=2,
        response_mask=mask,
        truncated=torch.zeros(2).bool(),
        groups=torch.zeros(2).long(),
        rewards=torch.zeros(2),
        question=nothing,
        answer=nothing,
    )
    return CreditInput(responses, TokenScores(torch.zeros(2, 3), torch.ones(2, 3)), mask)


def test_the_package_brings_its_rules():
    assert set(OWN) <= set(rule_names())
    assert rule_names() == sorted(rule_names())
    for name in OWN:
        rule = find_rule(name)
        assert rule.name == name
        assert rule.summary
        assert rule.summary.endswith(".")
        assert rule.needs_oracle == (name == "oracle")
        assert rule.gradient == (name == "gradient")


def test_attention_is_asked_for_by_name():
    assert find_rule("flow").needs == {"attention": AttentionNeed()}
    assert find_rule("uniform").needs == {}
    needs = find_rule("coupled").needs
    assert needs["local"].heads == HeadSelector("distance", "lowest", 0.3)
    assert needs["global"].heads == HeadSelector("distance", "highest", 0.3)


def test_a_third_party_registers_a_rule_in_five_lines():
    @credit_rule("later", needs={"mine": AttentionNeed(layers="all")})
    def later(batch: CreditInput) -> Tensor:
        """Later tokens score higher."""
        return batch.responses.response_mask.cumsum(1)

    rule = find_rule("later")
    assert (rule.summary, rule.needs["mine"].layers) == ("Later tokens score higher.", "all")
    assert "later" in rule_names()
    assert score_tokens(rule, two_responses()).tolist() == [[1, 2, 3], [1, 2, 0]]
    assert score_tokens(rule, two_responses()).dtype == torch.float32


def test_a_name_is_taken_once():
    def another(batch: CreditInput) -> Tensor:
        return batch.scores.entropy

    with pytest.raises(CreditError, match=r"name: must be new, got 'flow', which is registered already; choose"):
        credit_rule("flow")(another)
    credit_rule("mine")(another)
    credit_rule("mine")(another)  # a module that is loaded twice
    assert find_rule("mine").summary == ""


def test_an_unknown_rule_lists_those_there_are():
    with pytest.raises(CreditError, match=r"credit: must name a registered rule, got 'flux'; .*flow, .*waad, .*, and "):
        find_rule("flux")


def test_scores_are_checked():
    batch = two_responses()

    def scores_of(result: object) -> Tensor:
        rule = registry.CreditRule("mine", lambda _: result, {}, False, False, False, "")  # type: ignore[arg-type, return-value]
        return score_tokens(rule, batch)

    with pytest.raises(CreditError, match=r"credit: rule 'mine' must return .*shape \(2, 3\).*got \(2, 5\); score"):
        scores_of(torch.zeros(2, 5))
    with pytest.raises(CreditError, match=r"must return a tensor of shape \(2, 3\) .*, got list; score every"):
        scores_of([[0.0] * 3] * 2)
    for wrong in (float("nan"), float("inf"), -0.5):
        scores = torch.zeros(2, 3)
        scores[1, 1] = wrong
        with pytest.raises(CreditError, match=rf"finite scores .* got {wrong} for token 1 of response 1; map"):
            scores_of(scores)
    outside = torch.zeros(2, 3)
    outside[1, 2] = float("nan")  # padding: what stands there is of no account
    assert scores_of(outside).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_an_oracle_must_be_there():
    with pytest.raises(
        CreditError, match=r"credit: rule 'oracle' needs a task that knows .*; use a task with an oracle"
    ):
        score_tokens(find_rule("oracle"), two_responses())
    with pytest.raises(CreditError, match=r"oracle: must be known to the task, got responses without; use a task"):
        find_rule("oracle").function(two_responses())


def test_a_rule_that_raises_is_named():
    def broken(batch):
        raise KeyError("missing")

    rule = registry.CreditRule("mine", broken, {}, False, False, False, "")
    with pytest.raises(CreditError, match=r"credit: rule 'mine' must serve every rollout, got KeyError: 'missing'"):
        score_tokens(rule, two_responses())
