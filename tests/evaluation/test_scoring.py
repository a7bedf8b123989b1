"""Scoring runs a method once, or twice for a truth that compares two subjects."""

from dataclasses import dataclass
from functools import cache

import torch

from flowgraph import EvaluationItem, EvaluationMethod, Explanation, Subject
from flowgraph.evaluation.changed_subject import changed_subject
from flowgraph.evaluation.records import PairedTruth, Truth
from flowgraph.evaluation.scoring import score_of
from tests.fixtures.tiny import PROMPT, RESPONSE, chat, tiny


@cache
def subject() -> Subject:
    return Subject(*tiny(), EvaluationItem("one", chat(PROMPT), RESPONSE))


def answers_indicator(subject: Subject) -> torch.Tensor:
    return subject.answer.double()


@dataclass
class Single:
    unusable: str | None = None

    def score(self, explanation: Explanation):
        return {"sum": float(explanation.tokens.sum())}

    def to_dict(self):
        return {}


@dataclass
class Paired:
    other_subject: Subject
    unusable: str | None = None

    def score(self, explanation: Explanation):
        raise AssertionError("needs two explanations")

    def score_pair(self, explanation: Explanation, other: Explanation):
        return {"same": float(torch.equal(explanation.tokens, other.tokens))}

    def to_dict(self):
        return {}


METHOD = EvaluationMethod("answer", answers_indicator, "Mark the answer.")


def test_a_single_truth_scores_one_explanation():
    explanation, metrics = score_of(Single(), METHOD, subject())
    assert isinstance(Single(), Truth)
    assert not isinstance(Single(), PairedTruth)
    assert torch.equal(explanation.tokens, subject().answer.double())
    assert metrics == {"sum": float(subject().answer.sum())}


def test_an_explanation_that_is_known_is_not_computed_again():
    known = Explanation(tokens=torch.ones(subject().num_tokens))
    explanation, metrics = score_of(Single(), METHOD, subject(), explanation=known)
    assert explanation is known
    assert metrics == {"sum": float(subject().num_tokens)}


def test_a_paired_truth_receives_the_explanation_of_its_other_subject():
    earlier = subject().reasoning.nonzero().flatten()[2:4]
    other_answer = torch.zeros_like(subject().answer)
    other_answer[earlier] = True
    other = changed_subject(subject(), answer=other_answer)
    assert isinstance(Paired(other), PairedTruth)
    _, metrics = score_of(Paired(other), METHOD, subject())
    assert metrics == {"same": 0.0}
    _, metrics = score_of(Paired(subject()), METHOD, subject())
    assert metrics == {"same": 1.0}


def test_a_changed_subject_keeps_tokens_and_text_and_replaces_the_region():
    other_question = torch.zeros_like(subject().question)
    other_question[1:3] = True
    other = changed_subject(subject(), question=other_question)
    assert torch.equal(other.question, other_question)
    assert torch.equal(other.answer, subject().answer)
    assert torch.equal(other.reasoning, subject().reasoning)
    assert other.base.text == subject().base.text
    assert torch.equal(other.token_ids, subject().token_ids)
    assert other.prompt_length == subject().prompt_length
    assert torch.equal(subject().base.question, Subject(*tiny(), subject().item).question)


def test_a_subject_of_the_same_settings_has_the_same_rows():
    again = changed_subject(subject())
    assert torch.equal(again.base.graph.capacity, subject().base.graph.capacity)
