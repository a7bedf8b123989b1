"""Knock-out tasks on a tiny model: their units, and effects equal to those of single knock-outs."""

from functools import cache
from itertools import chain

import numpy as np
import pytest
import torch

from flowgraph import EvaluationItem, Explanation, Intervention, Subject, attention_cell, knockout
from flowgraph.evaluation.catalogue import evaluation_tasks, find_task
from flowgraph.evaluation.tasks.knockout import (
    drops,
    edge_knockout,
    line_knockout,
    question_knockout_own,
    question_knockout_short,
    step_suppression,
)
from flowgraph.evaluation.tasks.units import answer_line, chunks_of, lines_of, lines_or_chunks, steps_before_answer
from flowgraph.interventions.answer_logprobs import answer_logprobs
from flowgraph.interventions.knockout import attention_cut
from tests.fixtures.tiny import chat, tiny_model
from tests.fixtures.tokenizers import byte_level

QUESTION = "Tom has 3 apples. He buys 4 more."
STEPS = ["He has 3.", "He buys 4.", "That is 3 + 4.", "So he has 7."]


@cache
def subject(lines: tuple[str, ...] = tuple(STEPS), answer_line: str = "Answer: 7") -> Subject:
    response = "\n".join([*lines, answer_line])
    item = EvaluationItem("one", chat(QUESTION), response, answer="7")
    return Subject(tiny_model(2048), byte_level(), item)


def flat(units: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(units))


def texts_of(subject: Subject, units: list[list[int]]) -> list[str]:
    spans = subject.base.spans
    return [subject.base.text[int(spans[unit[0], 0]) : int(spans[unit[-1], 1])] for unit in units]


def test_chunks_are_equal_ordered_and_complete():
    chunks = chunks_of(list(range(3, 32)), 12)
    assert flat(chunks) == list(range(3, 32))
    assert {len(chunk) for chunk in chunks} == {2, 3}
    assert chunks_of([5, 6], 12) == [[5], [6]]
    assert chunks_of([], 12) == []


def test_lines_are_the_lines_of_the_text():
    lines = lines_of(subject(), subject().reasoning)
    assert [text.strip() for text in texts_of(subject(), lines)] == [*STEPS, "Answer:"]
    assert flat(lines) == subject().positions(subject().reasoning)


def test_steps_leave_out_the_words_that_lead_up_to_the_answer():
    steps = steps_before_answer(subject())
    assert [text.strip() for text in texts_of(subject(), steps)] == STEPS
    assert texts_of(subject(), [answer_line(subject())])[0].split() == ["Answer:", "7"]
    # Without a line of its own, the answer has no such words.
    in_prose = subject(("He has 3 and buys 4, so the answer is 7.",), "")
    assert answer_line(in_prose) == in_prose.positions(in_prose.answer)
    alone = subject((*STEPS,), "7")
    assert answer_line(alone) == alone.positions(alone.answer)
    assert [text.strip() for text in texts_of(alone, steps_before_answer(alone))] == STEPS


def test_units_are_lines_where_there_are_about_as_many_and_else_equal_chunks():
    chunks = lines_or_chunks(subject(), 12)
    assert len(chunks) == 12
    assert flat(chunks) == flat(steps_before_answer(subject()))
    assert lines_or_chunks(subject(), 4) == steps_before_answer(subject())
    assert lines_or_chunks(subject(), 3) == steps_before_answer(subject())
    assert len(lines_or_chunks(subject(), 2)) == 2


def test_drops_are_those_of_single_knock_outs():
    units = lines_or_chunks(subject(), 12)
    effects = drops(subject(), units)
    for unit, effect in zip(units, effects, strict=True):
        alone = knockout(subject().model, subject().base, tokens=unit)
        assert effect == pytest.approx(-alone.change, abs=1e-5)
    assert np.abs(effects).max() > 0.01


def test_line_knockout_measures_twelve_chunks():
    truth = line_knockout(subject())
    assert truth.unusable is None
    assert len(truth.units) == 12
    assert np.allclose(truth.effects, drops(subject(), truth.units))
    perfect = torch.zeros(subject().num_tokens, dtype=torch.float64)
    for unit, effect in zip(truth.units, truth.effects, strict=True):
        perfect[unit] = float(effect) / len(unit)
    assert truth.score(Explanation(tokens=perfect))["spearman"] == pytest.approx(1)


def test_question_knockout_has_one_unit_for_each_question_token():
    truth = question_knockout_short(subject())
    assert [unit for (unit,) in truth.units] == subject().positions(subject().question)
    assert truth.unusable is None


def test_a_short_reasoning_is_unusable_with_the_reason():
    truth = line_knockout(subject(("3",), "So 7"))
    assert "fewer than the 6" in (truth.unusable or "")


def test_edge_knockout_cuts_what_one_part_reads_from_another():
    truth = edge_knockout(subject())
    assert truth.unusable is None
    assert len(truth.units) == 7
    assert truth.units[0] == subject().positions(subject().question)
    assert truth.units[-1] == answer_line(subject())
    assert len(truth.pairs) == 21
    for number in (0, 7, 20):
        reader, source = truth.pairs[number]
        edges = []
        for target in truth.units[reader]:
            for origin in truth.units[source]:
                row, column = attention_cell(subject().base, origin, target)
                if row != column:
                    edges.append((origin, target))
        alone = knockout(subject().model, subject().base, edges=edges)
        assert truth.effects[number] == pytest.approx(-alone.change, abs=1e-5)


def test_step_suppression_measures_the_distributions_of_later_steps():
    truth = step_suppression(subject())
    steps = steps_before_answer(subject())
    assert truth.unusable is None
    assert truth.units == [*steps, answer_line(subject())]
    assert len(truth.pairs) == 10
    assert (truth.effects >= 0).all()
    # One pair by hand: step 0 masked, read by step 2.
    model = subject().model
    positions = torch.tensor(steps[2])
    before = answer_logprobs(model, subject().base, positions, 1)[0]
    with attention_cut(model, subject().base, [Intervention(tokens=steps[0])]):
        after = answer_logprobs(model, subject().base, positions, 1)[0]
    expected = (before.exp() * (before - after)).sum(-1).mean()
    assert truth.effects[truth.pairs.index((2, 0))] == pytest.approx(float(expected), rel=1e-3)


def test_a_response_without_steps_is_unusable_for_step_suppression():
    truth = step_suppression(subject(("He has 3.",)))
    assert "fewer than" in (truth.unusable or "")


@pytest.mark.filterwarnings("ignore:.*answer")
def test_the_models_own_response_is_generated_where_the_item_has_none():
    item = find_task("question_knockout_own").items("dev", 1, 0)[0]
    assert item.response is None
    own = Subject(tiny_model(2048), byte_level(), EvaluationItem("own", chat("Hi"), None))
    assert own.num_tokens > own.prompt_length
    truth = question_knockout_own(own)
    assert len(truth.units) == len(own.positions(own.question))


def test_every_task_states_its_metrics_and_what_it_shows():
    for name in evaluation_tasks():
        task = find_task(name)
        assert task.shows, name
        assert task.cannot_show, name
        assert task.licence, name
        assert len({metric.name for metric in task.metrics}) == len(task.metrics)


@pytest.mark.parametrize(
    "name", ["line_knockout", "question_knockout_short", "edge_knockout", "step_suppression", "detour"]
)
def test_a_task_returns_exactly_its_metrics(name: str):
    task = find_task(name)
    item = task.items("dev", 1, 0)[0]
    subject = Subject(tiny_model(2048), byte_level(), item)
    truth = task.function(subject)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(subject.num_tokens, generator=generator)
    edges = torch.randn(subject.num_tokens, subject.num_tokens, generator=generator)
    figures = truth.score(Explanation(tokens=tokens, edges=edges))
    assert set(figures) == {metric.name for metric in task.metrics}
    assert all(isinstance(value, float) for value in figures.values())
