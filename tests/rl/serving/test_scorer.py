"""The weights of a request are those of EngineCredit, whatever it was batched with."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.config import CreditConfig
from rl.credit import registry
from rl.credit.ratings import Ratings
from rl.credit.registry import credit_rule
from rl.integrations.engine_credit import EngineCredit, EngineSequence
from rl.policy.loading import load_model
from rl.serving.adapters import read_adapter
from rl.serving.limits import ServiceLimits
from rl.serving.scorer import Scorer, ScoringJob, at_border, selects_heads
from tests.fixtures.engines import DIGITS, TOKENIZER, sequences
from tests.fixtures.policies import tiny_policy
from tests.fixtures.serving import SOFT, scorer, write_adapter

RULES = [
    "reach_sharp",
    "flow",
    "flow_sharp",
    "entropy",
    "max_attention",
    "correlation",
    "atpo",
    "taco",
    "coupled",
    "fai",
]


def job(*chosen: EngineSequence, credit: CreditConfig = SOFT, **changes: Any) -> ScoringJob:
    values = {"temperature": 1.0, "seed": 7, "adapter": None, "answers": (None,) * len(chosen), **changes}
    return ScoringJob(sequences=chosen, credit=credit, **values)


def weights(outcome: Any) -> list[list[float]]:
    assert outcome.error == "", outcome.message
    return [sequence.weights for sequence in outcome.sequences]


def assert_equal(found: list[list[float]], expected: list[list[float]], tolerance: float = 1e-6) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def tiny(saved_model: Path) -> Scorer:
    return scorer(saved_model)


@pytest.mark.parametrize("shape", ["top_q", "soft", "only_top"])
@pytest.mark.parametrize("rule", RULES)
def test_weights_do_not_depend_on_the_batch(tiny: Scorer, rule: str, shape: str):
    """Alone, with requests of other lengths in any order, and in micro-batches of any size."""
    credit = CreditConfig(rule=rule, shape=shape)
    groups = [sequences()[:2], sequences()[2:3], sequences()[3:], sequences()[1:3]]
    jobs = [job(*group, credit=credit) for group in groups]
    alone = [weights(tiny.score([one])[0]) for one in jobs]
    local = EngineCredit(
        credit, tiny_policy(context=512), TOKENIZER, find_answer=DIGITS.find_answer, micro_batch_size=1
    )
    for group, found in zip(groups, alone, strict=True):
        expected = local.weigh(group).weights
        assert_equal(found, [expected[row, : len(one.response_ids)].tolist() for row, one in enumerate(group)])
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        for number, outcome in zip(order, tiny.score([jobs[number] for number in order]), strict=True):
            assert_equal(weights(outcome), alone[number])


def test_weights_do_not_depend_on_the_size_of_micro_batches(saved_model: Path):
    jobs = [job(*group) for group in (sequences(), sequences()[1:])]
    expected = [weights(outcome) for outcome in scorer(saved_model).score(jobs)]
    for max_batch_tokens in (1, 20, 40):
        found = scorer(saved_model, max_batch_tokens=max_batch_tokens).score(jobs)
        for outcome, other in zip(found, expected, strict=True):
            assert_equal(weights(outcome), other)


@pytest.mark.parametrize("rule", ["random", "position_matched", "shuffled_flow_sharp"])
def test_draws_belong_to_the_request(tiny: Scorer, rule: str):
    credit = CreditConfig(rule=rule)
    one = job(*sequences(), credit=credit)
    other = job(*sequences(), credit=credit, seed=8)
    alone = weights(tiny.score([one])[0])
    together = tiny.score([other, one, other])
    assert_equal(weights(together[1]), alone)
    assert weights(together[0]) == weights(together[2])
    assert weights(together[0]) != alone


def test_a_fallback_compares_the_responses_of_one_request(tiny: Scorer):
    """A response whose tie is weak in its own group keeps that result beside requests of strong ties, and reversed."""
    local = EngineCredit(SOFT, tiny_policy(context=512), TOKENIZER, find_answer=DIGITS.find_answer)
    given = sequences()
    groups = [[given[0]], [given[0], given[3]], [given[2], given[3]], given]
    outcomes = tiny.score([job(*group) for group in groups])
    for group, outcome in zip(groups, outcomes, strict=True):
        credit = local.weigh(group)
        expected = [credit.weights[row, : len(one.response_ids)].tolist() for row, one in enumerate(group)]
        assert_equal(weights(outcome), expected)
        assert len({sequence.unanchored for sequence in outcome.sequences}) <= 2
    # An answer is always tied to itself: a single response never falls back, one without an answer always does.
    assert [sequence.unanchored for sequence in outcomes[0].sequences] == [False]
    assert outcomes[3].sequences[1].unanchored


def test_a_rule_that_reads_all_responses_reads_those_of_one_request(tiny: Scorer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    seen = []

    @credit_rule("batch_size", weighs=True, whole_batch=True)
    def batch_size(batch):
        """Weigh every token by the number of responses."""
        seen.append(batch.responses.num_sequences)
        return torch.full(batch.scored.shape, float(batch.responses.num_sequences))

    credit = CreditConfig(rule="batch_size")
    outcomes = tiny.score([job(*sequences()[:3], credit=credit), job(sequences()[3], credit=credit)])
    assert sorted(seen) == [1, 3]
    assert weights(outcomes[0])[0][0] == 3
    assert weights(outcomes[1])[0][0] == 1


def test_the_answer_is_the_given_one_or_the_stated_one(tiny: Scorer):
    given = sequences()
    found = tiny.score([job(given[0], given[1], given[2], answers=((2, 3), None, None))])[0].sequences
    assert [(entry.found, entry.answer) for entry in found] == [("given", (2, 3)), ("none", None), ("stated", (4, 5))]
    # A given answer takes the place of the stated one, so that tokens after it do not compete.
    assert found[0].weights[2:] == [1.0] * 6
    assert weights(tiny.score([job(given[0])])[0])[0] != found[0].weights


def test_an_error_concerns_its_own_request(tiny: Scorer):
    given = sequences()
    wrong_prompt = EngineSequence(given[0].prompt_ids, given[0].response_ids, prompt="x=1;x?")
    jobs = [
        job(given[0]),
        job(wrong_prompt),
        job(given[0], answers=((0, 9),)),
        job(given[1], EngineSequence(given[1].prompt_ids, [5, 5]), answers=(None, (2, 4))),
        job(given[0], credit=CreditConfig(rule="flow", layers="77")),
        job(given[2]),
    ]
    outcomes = tiny.score(jobs)
    assert_equal(weights(outcomes[0]), weights(tiny.score([jobs[0]])[0]))
    assert_equal(weights(outcomes[5]), weights(tiny.score([jobs[5]])[0]))
    messages = [outcome.message for outcome in outcomes]
    assert messages[1].startswith("prompts: must be the text of the ids of sequence 0, got")
    assert messages[2].startswith(
        "sequences[0].answer: must lie within the response of 7 characters, got [0, 9]; count"
    )
    assert messages[3].startswith(
        "sequences[1].answer: must lie within the response of 2 characters, got [2, 4]; count"
    )
    assert messages[4].startswith("layers: must ")
    assert {outcomes[row].error for row in (1, 2, 3)} == {"ConfigError"}


def test_an_error_of_a_rule_concerns_its_own_request(tiny: Scorer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))

    @credit_rule("no_short_ones")
    def no_short_ones(batch):
        """Refuse responses of fewer than 4 tokens."""
        lengths = batch.responses.response_mask.sum(1)
        return torch.where(lengths[:, None] < 4, -1.0, 1.0).expand(batch.scored.shape)

    credit = CreditConfig(rule="no_short_ones")
    outcomes = tiny.score([job(one, credit=credit) for one in sequences()])
    assert [outcome.error for outcome in outcomes] == ["", "CreditError", "", ""]
    assert "must return finite scores of at least 0, got -1.0" in outcomes[1].message


def test_credit_follows_the_version_of_the_policy(saved_model: Path, tmp_path: Path):
    of = scorer(saved_model, kept_adapters=1)
    credit = CreditConfig(rule="flow", shape="soft")
    versions = [None, *(read_adapter(step, write_adapter(tmp_path / str(step), seed=step)) for step in (1, 2))]
    outcomes = of.score([job(*sequences(), credit=credit, adapter=adapter) for adapter in versions])
    found = [weights(outcome) for outcome in outcomes]
    assert found[0] != found[1] != found[2]
    for adapter, own in zip(versions, found, strict=True):
        assert_equal(weights(of.score([job(*sequences(), credit=credit, adapter=adapter)])[0]), own)
        local: Any = tiny_policy(context=512)
        if adapter is not None:
            from peft import PeftModel

            local = PeftModel.from_pretrained(local, adapter.folder)
        expected = EngineCredit(credit, local, TOKENIZER, find_answer=DIGITS.find_answer).weigh(sequences()).weights
        # The weights of these adapters are large, and rounding with them.
        assert_equal(own, [expected[row, : len(one)].tolist() for row, one in enumerate(own)], 1e-5)


def test_an_adapter_that_cannot_be_loaded_fails_its_own_requests(tiny: Scorer, tmp_path: Path):
    foreign = read_adapter("1", write_adapter(tmp_path / "a", seed=1, family="gpt2"))
    outcomes = tiny.score([job(sequences()[0]), job(sequences()[0], adapter=foreign)])
    assert [outcome.error for outcome in outcomes] == ["", "CheckpointError"]
    assert weights(tiny.score([job(sequences()[0])])[0]) == weights(outcomes[0])


def test_a_left_padded_model_with_learned_positions_is_scored_by_its_own_positions(tmp_path: Path):
    """An adapter hides the arguments of the forward pass; without positions, padding would be counted."""
    folder = tmp_path / "model"
    tiny_policy("gpt2").save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    adapter = read_adapter("1", write_adapter(tmp_path / "a", seed=1, family="gpt2"))
    of = scorer(folder)
    jobs = [job(one, credit=CreditConfig(rule="entropy", shape="soft"), adapter=adapter) for one in sequences()]
    for one, outcome in zip(jobs, of.score(jobs), strict=True):
        assert_equal(weights(outcome), weights(of.score([one])[0]))


def ratings(*scores: list[float], tie: list[float] | None = None) -> Ratings:
    values = torch.tensor(scores)
    ties = None if tie is None else torch.tensor(tie)
    return Ratings(values, torch.ones_like(values, dtype=torch.bool), ties, torch.ones(len(scores), dtype=torch.bool))


def test_selections_at_their_border_are_found():
    top = CreditConfig(rule="flow", share=0.5)
    assert not at_border(ratings([4.0, 3.0, 2.0, 1.0]), top, 1e-3)
    assert at_border(ratings([4.0, 3.0, 2.999, 1.0]), top, 1e-3)
    assert not at_border(ratings([4.0, 3.999, 2.0, 1.0]), top, 1e-3)
    assert at_border(ratings([4.0, 3.0, 3.0, 1.0]), CreditConfig(rule="flow", shape="bottom_q", share=0.5), 1e-3)
    assert not at_border(ratings([0.0, 0.0]), top, 1e-3)
    assert not at_border(ratings([4.0, 4.0]), CreditConfig(rule="flow", share=1.0), 1e-3)
    assert not at_border(ratings([4.0, 4.0]), CreditConfig(rule="flow", shape="soft"), 1e-3)
    fallback = CreditConfig(rule="reach", shape="soft", fallback=0.5)
    assert at_border(ratings([1.0], [1.0], tie=[1.0, 3.0]), fallback, 1e-3)
    assert not at_border(ratings([1.0], [1.0], tie=[1.0, 2.0]), fallback, 1e-3)


def test_rules_that_select_heads_are_scored_alone(tiny: Scorer):
    assert selects_heads(CreditConfig(rule="fai"))
    assert selects_heads(CreditConfig(rule="flow", heads="global"))
    assert not selects_heads(CreditConfig(rule="flow"))
    outcomes = tiny.score([job(one, credit=CreditConfig(rule="fai")) for one in sequences()])
    assert [outcome.alone for outcome in outcomes] == [1, 1, 1, 1]


def test_every_rule_is_checked_at_the_start(tiny: Scorer):
    tiny.check_rules([CreditConfig(rule=rule) for rule in RULES])
    from rl.errors import CreditError

    with pytest.raises(CreditError, match=r"credit: must be a rule that another trainer can serve, got 'delta', which"):
        tiny.check_rules([CreditConfig(rule="delta")])


def test_the_shipped_model_is_served_with_the_answers_of_its_task():
    of = Scorer("program", limits=ServiceLimits(), task="program")
    model, tokenizer = load_model("program")
    text = "B=8;H=9;A=5;F=A+6;?F:"
    one = EngineSequence(tokenizer(text)["input_ids"], tokenizer("A=5;F=A+6=1;#F=1")["input_ids"])
    (found,) = of.score([job(one, one)])
    assert [sequence.found for sequence in found.sequences] == ["stated", "stated"]
    assert len(set(itertools.chain(*weights(found)))) > 2
    del model
