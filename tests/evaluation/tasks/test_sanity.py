"""Sanity checks: what changes under each condition, and how far explanations that ignore it fail."""

from functools import cache

import pytest
import torch

from flowgraph import EvaluationItem, EvaluationMethod, InvalidInputError, Subject
from flowgraph.evaluation.catalogue import find_task
from flowgraph.evaluation.records import PairedTruth
from flowgraph.evaluation.scoring import score_of
from flowgraph.evaluation.tasks.sanity import (
    parameter_randomization,
    question_specificity,
    target_randomization,
)
from tests.fixtures.tiny import PROMPT, chat, tiny_model
from tests.fixtures.tokenizers import byte_level

RESPONSE = "He starts with 3.\nHe buys 4 apples.\nTogether that is 3 + 4 = 7.\nAnswer: 7"
TASKS = {
    "parameter_randomization": parameter_randomization,
    "target_randomization": target_randomization,
    "question_specificity": question_specificity,
}


@cache
def subject(system: bool = False) -> Subject:
    messages = chat(PROMPT)
    if system:
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    return Subject(tiny_model(2048), byte_level(), EvaluationItem("one", messages, RESPONSE, answer="7"))


def position(subject: Subject) -> torch.Tensor:
    return torch.arange(subject.num_tokens, dtype=torch.float64)


def attention(subject: Subject) -> torch.Tensor:
    return subject.trace("attention").potential


def flow(subject: Subject) -> torch.Tensor:
    return subject.trace("attention").throughput


def method(function) -> EvaluationMethod:
    return EvaluationMethod(function.__name__, function, "A method.")


@pytest.mark.parametrize("name", TASKS)
def test_a_method_that_ignores_the_condition_does_not_change(name: str):
    truth = TASKS[name](subject())
    assert isinstance(truth, PairedTruth)
    assert truth.unusable is None
    assert find_task(name).paired
    assert not find_task(name).compares
    _, figures = score_of(truth, method(position), subject())
    assert set(figures) == {metric.name for metric in find_task(name).metrics}
    assert figures["abs_spearman"] == pytest.approx(1)
    assert figures["total_variation"] == pytest.approx(0)
    assert truth.to_dict()["unusable"] is None


def test_scores_of_the_model_change_with_its_weights():
    truth = parameter_randomization(subject())
    _, figures = score_of(truth, method(attention), subject())
    assert figures["abs_spearman"] < 0.99
    assert figures["total_variation"] > 0.01
    assert parameter_randomization(subject()).other_subject.model is truth.other_subject.model


def test_another_answer_lies_in_the_reasoning_and_only_tokens_before_it_are_compared():
    truth = target_randomization(subject())
    other = truth.other_subject
    first = int(other.answer.nonzero()[0])
    assert bool((other.answer & subject().reasoning).sum() == other.answer.sum())
    assert int(other.answer.sum()) == int(subject().answer.sum())
    assert first >= subject().positions(subject().reasoning)[len(subject().positions(subject().reasoning)) // 2]
    assert not bool(truth.compared[first:].any())
    assert bool((truth.compared == ((subject().question | subject().reasoning) & (position(subject()) < first))).all())
    _, figures = score_of(truth, method(attention), subject())
    assert figures["total_variation"] > 0


def test_another_question_is_the_text_before_it_or_its_first_half():
    truth = question_specificity(subject(system=True))
    assert truth.kind == "the text before the question"
    first = subject(system=True).positions(subject(system=True).question)[0]
    places = subject(system=True).positions(truth.other_subject.question)
    assert places
    assert places[0] > 0
    assert places[-1] < first
    assert torch.equal(truth.compared, subject(system=True).reasoning)

    # The throughput depends on where the unit enters, the potential does not.
    _, of_flow = score_of(truth, method(flow), subject(system=True))
    _, of_potential = score_of(truth, method(attention), subject(system=True))
    assert of_flow["total_variation"] > 1e-4
    assert of_potential["total_variation"] == pytest.approx(0, abs=1e-12)


def test_without_text_before_the_question_its_first_half_is_taken():
    alone = Subject(tiny_model(2048), byte_level(), EvaluationItem("raw", "12 + 3 =", "15, so 15", answer="15"))
    question = alone.positions(alone.question)
    assert question[0] <= 1
    truth = question_specificity(alone)
    assert truth.kind == "the first half of the question"
    assert alone.positions(truth.other_subject.question) == question[: len(question) // 2]


def test_one_explanation_is_not_enough():
    truth = target_randomization(subject())
    with pytest.raises(InvalidInputError, match="must compare the explanations of two subjects for another answer"):
        truth.score(method(position).explain(subject()))


def test_short_texts_are_unusable_with_the_reason():
    short = Subject(tiny_model(2048), byte_level(), EvaluationItem("short", "2+2", "4", answer="4"))
    for name, function in TASKS.items():
        truth = function(short)
        assert truth.unusable, name
        assert truth.to_dict()["unusable"] == truth.unusable
