"""Programs: their lines by substitution, their marks by a slow reading, and their rewards by hand."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import Task, TaskError, make_task
from rl.base_models.program_recipe import ProgramRecipe
from rl.tasks.base import DetourTask
from rl.tasks.definitions import USUAL_MISTAKES, Mistakes
from rl.tasks.program import NAMES, Program, demonstration
from tests.reference import rl_tasks as slow

some = settings(max_examples=60, deadline=None)
VOCABULARY = ProgramRecipe.vocabulary
BY_HAND = Program(seed=1).sample("train", 0)


def test_it_is_a_task_that_knows_its_detours():
    assert isinstance(Program(), Task)
    assert isinstance(Program(), DetourTask)
    assert make_task("program", seed=3) == Program(seed=3)
    assert Program().size is None


@some
@given(st.integers(0, 10**9), st.integers(0, 99), st.sampled_from(["train", "eval"]))
def test_problems_are_programs_that_ask_for_a_sum_of_sums(index: int, seed: int, split: str):
    sample = Program(seed=seed).sample(split, index)
    assert Program(seed=seed).sample(split, index) == sample
    assert json.loads(json.dumps(sample.metadata)) == sample.metadata
    prompt = str(sample.prompt)
    assert len(VOCABULARY.token_ids(prompt)) == 27
    right_sides = slow.definitions(prompt)
    assert sorted(right_sides) == sorted(NAMES)
    earlier: set[str] = set()
    for name, text in right_sides.items():
        assert text.isdigit() or text[0] in earlier
        earlier.add(name)
    queried = prompt.split("?")[1][0]
    assert sample.answer == str(slow.values(prompt)[queried])
    assert set(sample.metadata["needed"]) == slow.needed(prompt)
    assert sample.metadata["needed"][-1] == queried
    assert len(sample.metadata["needed"]) in (3, 4)


def test_splits_and_seeds_are_different_streams():
    first = {str(Program().sample("train", index).prompt) for index in range(500)}
    assert len(first) > 490
    assert not first & {str(Program().sample("eval", index).prompt) for index in range(500)}
    assert not first & {str(Program(seed=1).sample("train", index).prompt) for index in range(500)}


@some
@given(st.integers(0, 10**6))
def test_demonstrations_without_mistakes_are_right_and_work_out_every_line(index: int):
    task = Program()
    sample = task.sample("train", index)
    prompt = str(sample.prompt)
    response = demonstration(sample, Random(index))
    assert task.reward(sample, response) == 1.0
    values = slow.values(prompt)
    lines = []
    for name, text in slow.definitions(prompt).items():
        lines.append(f"{name}={text};" if text.isdigit() else f"{name}={text}={values[name]};")
    assert response == "".join(lines) + f"#{prompt[-2]}={sample.answer}"
    marked = len(task.oracle(sample, response)) + len(task.detours(sample, response))
    assert marked == response.split("#")[0].count("=")


@some
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_marks_are_those_of_a_slow_reading(index: int, rate: float):
    task = Program()
    sample = task.sample("train", index)
    response = demonstration(sample, Random(index), Mistakes(rate, rate, rate, rate))
    found = (task.oracle(sample, response), task.detours(sample, response))
    assert found == slow.program_marks(str(sample.prompt), response)
    assert len(VOCABULARY.token_ids(response)) <= 35
    assert sum(map(len, found)) == response.split("#")[0].count("=")


@some
@given(st.text("ADH=+378#;", max_size=40))
def test_marks_of_any_text_are_those_of_a_slow_reading(text: str):
    task = Program()
    found = (task.oracle(BY_HAND, text), task.detours(BY_HAND, text))
    assert found == slow.program_marks(str(BY_HAND.prompt), text)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("#E=8", 1.0),
        ("D=1;#E=8", 1.0),
        ("#E=8;", 0.0),
        ("#E=7", 0.0),
        ("#D=8", 0.0),
        ("E=8", 0.0),
        ("", 0.0),
        ("<think>#E=8", 0.0),
    ],
)
def test_only_an_exact_ending_is_rewarded(completion: str, reward: float):
    assert BY_HAND.prompt == "D=1;A=D+7;G=D+5;C=5;B=A+6;E=B+4;H=4;F=B+4;?E:"
    assert Program().reward(BY_HAND, completion) == reward


def test_lengths_shares_and_rewards_of_demonstrations():
    task = Program()
    random = Random(1)
    reward = 0.0
    length = 0
    num_decisive = 0
    num_detours = 0
    for index in range(1500):
        sample = task.sample("train", index)
        response = demonstration(sample, random, USUAL_MISTAKES)
        reward += task.reward(sample, response)
        length += len(VOCABULARY.token_ids(response)) + 1
        num_decisive += len(task.oracle(sample, response))
        num_detours += len(task.detours(sample, response))
    assert reward / 1500 == pytest.approx(0.36, abs=0.04)
    assert length / 1500 == pytest.approx(33.4, abs=0.3)
    assert num_decisive / length == pytest.approx(0.162, abs=0.01)
    assert num_detours / length == pytest.approx(0.239, abs=0.01)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": "1"}, r"seed: must be an integer, got '1'; 0 is the default"),
        ({"name": "other"}, r"name: must be 'program', got 'other'; leave it out"),
        ({"level": "0:0"}, r"options: must be arguments of the task 'program', got level .*; it takes seed, name"),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises(TaskError, match=message):
        make_task("program", **options)
