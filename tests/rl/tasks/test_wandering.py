"""The wandering chain: its problems by substitution, its marks read character by character, its rewards by hand."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import Task, TaskError, make_task
from rl.base_models.wandering_recipe import WanderingRecipe
from rl.tasks.base import DetourTask
from rl.tasks.definitions import USUAL_MISTAKES, Mistakes
from rl.tasks.wandering import LEVELS, NAMES, Wandering, demonstration, read_level
from tests.reference import rl_tasks as slow

some = settings(max_examples=60, deadline=None)
VOCABULARY = WanderingRecipe.vocabulary
BY_HAND = Wandering(level="0:1", seed=2).sample("train", 0)


def num_tokens(text: str) -> int:
    return len(VOCABULARY.token_ids(text))


def test_it_is_a_task_that_knows_its_detours():
    assert isinstance(Wandering(), Task)
    assert isinstance(Wandering(), DetourTask)
    assert make_task("wandering", level="0:5", seed=3) == Wandering(level="0:5", seed=3)
    assert Wandering().size is None


@some
@given(st.integers(0, 10**9), st.sampled_from(LEVELS), st.integers(0, 99), st.sampled_from(["train", "eval"]))
def test_problems_are_two_trees_with_the_value_of_the_last_of_the_first(index: int, level: str, seed: int, split: str):
    task = Wandering(level=level, seed=seed)
    sample = task.sample(split, index)
    assert task.sample(split, index) == sample
    assert json.loads(json.dumps(sample.metadata)) == sample.metadata
    prompt = str(sample.prompt)
    assert num_tokens(prompt) == 23
    right_sides = slow.definitions(prompt)
    assert sorted(right_sides) == sorted(NAMES)
    queried = prompt.split("?")[1][0]
    assert sample.answer == str(slow.values(prompt)[queried])

    # The main tree is a chain of three or four variables, from its root; the rest is one tree of its own.
    chain = sample.metadata["needed"]
    assert len(chain) in (3, 4)
    assert set(chain) == slow.needed(prompt)
    assert chain[-1] == queried
    assert right_sides[chain[0]].isdigit()
    assert [right_sides[name][0] for name in chain[1:]] == chain[:-1]
    rest = set(NAMES) - set(chain)
    assert sum(right_sides[name].isdigit() for name in rest) == 1
    assert all(right_sides[name][0] in rest for name in rest if not right_sides[name].isdigit())
    assert all(text[2] in "34567" for text in right_sides.values() if not text.isdigit())
    # A level changes what the prompt says of it, and nothing else.
    assert prompt[:-5] == str(Wandering(seed=seed).sample(split, index).prompt)[:-5]
    assert prompt[-5:] == "f{}d{}:".format(*read_level(level))


def test_splits_and_seeds_are_different_streams():
    first = {str(Wandering().sample("train", index).prompt) for index in range(500)}
    assert len(first) > 490
    assert not first & {str(Wandering().sample("eval", index).prompt) for index in range(500)}
    assert not first & {str(Wandering(seed=1).sample("train", index).prompt) for index in range(500)}


@some
@given(st.integers(0, 10**6), st.sampled_from(LEVELS))
def test_demonstrations_without_mistakes_are_right_and_marked_from_end_to_end(index: int, level: str):
    task = Wandering(level=level)
    sample = task.sample("train", index)
    response = demonstration(sample, Random(index))
    assert response == demonstration(sample, Random(index))
    assert task.reward(sample, response) == 1.0
    span = task.find_answer(response)
    assert span == (len(response) - 1, len(response))

    # Every step is stated once for each segment, and its value is right.
    prompt = str(sample.prompt)
    values = slow.values(prompt)
    right_sides = slow.definitions(prompt)
    decisive = task.oracle(sample, response)
    detours = task.detours(sample, response)
    for start, end in [*decisive, *detours]:
        variable = response[start - 1]
        stated = response[start + 1 : end]
        assert stated in (right_sides[variable], str(values[variable]))
    assert len(decisive) == 2 * len(sample.metadata["needed"]) - 1
    _, num_detours = read_level(level)
    roots = [name for name in NAMES if right_sides[name].isdigit() and name not in sample.metadata["needed"]]
    assert sum(response[start - 1] in roots for start, _ in detours) == num_detours


@some
@given(st.integers(0, 10**6), st.sampled_from(LEVELS), st.floats(0, 1))
def test_marks_are_those_of_a_slow_reading(index: int, level: str, rate: float):
    task = Wandering(level=level)
    sample = task.sample("train", index)
    response = demonstration(sample, Random(index), Mistakes(rate, rate, rate, rate))
    assert (task.oracle(sample, response), task.detours(sample, response)) == slow.wandering_marks(
        str(sample.prompt), response
    )
    assert response.count("#") == 1
    assert num_tokens(response) <= 128


@some
@given(st.text("ABF=+37#;, so?f0", max_size=60))
def test_marks_of_any_text_are_those_of_a_slow_reading(text: str):
    task = Wandering()
    found = (task.oracle(BY_HAND, text), task.detours(BY_HAND, text))
    assert found == slow.wandering_marks(str(BY_HAND.prompt), text)
    answer = task.find_answer(text)
    assert answer is None or text[answer[0]].isdigit()
    assert task.reward(BY_HAND, text) == float(text.endswith("#A=0"))


def test_marks_by_hand():
    assert BY_HAND.prompt == "F=D+3;A=C+3;E=B+7;C=F+5;B=8;D=9;?Af0d1:"
    task = Wandering()
    response = "E=B+7,B=8~E=4;A=D+3_D=9;A=2~#A=2"
    assert [response[start:end] for start, end in task.oracle(BY_HAND, response)] == ["=D+3", "=9", "=2"]
    assert [response[start - 1 : end] for start, end in task.detours(BY_HAND, response)] == ["E=B+7", "B=8", "E=4"]
    for text in ("", "#A=0", "A", "A=", "A=B", "A=B+8", "=4", "A =4", "G=4"):
        assert task.oracle(BY_HAND, text) == task.detours(BY_HAND, text) == []


@pytest.mark.parametrize(
    ("completion", "reward", "is_stated"),
    [
        ("#A=0", 1.0, True),
        ("E=B+7,#A=0", 1.0, True),
        ("#A=1#A=0", 1.0, True),
        ("#A=0;", 0.0, False),
        ("#A=0 ", 0.0, False),
        ("#A=1", 0.0, True),
        ("#C=0", 0.0, True),
        ("A=0", 0.0, False),
        ("#A=00", 0.0, False),
        ("#0", 0.0, False),
        ("#A=0<unk>", 0.0, False),
        ("<think>#A=0", 0.0, False),
    ],
)
def test_only_an_exact_ending_is_rewarded(completion: str, reward: float, is_stated: bool):
    task = Wandering()
    assert task.reward(BY_HAND, completion) == reward
    if "<think>" not in completion:
        assert (task.find_answer(completion) is not None) == is_stated


def test_mistakes_have_their_rates_and_later_steps_go_on_from_them():
    """Sums of at least 10 are stated one too high at their own rate, and the next sum starts from what was stated."""
    random = Random(0)
    counts: Counter[tuple[str, bool]] = Counter()
    for index in range(800):
        sample = Wandering(level="0:2").sample("train", index)
        right_sides = slow.definitions(str(sample.prompt))
        response = demonstration(sample, random, USUAL_MISTAKES)
        value = 0
        addends: list[int] = []
        for start, end in sorted([*slow.wandering_marks(str(sample.prompt), response)[0],
                                  *slow.wandering_marks(str(sample.prompt), response)[1]]):  # fmt: skip
            variable = response[start - 1]
            stated = response[start + 1 : end]
            if "+" in stated:
                counts["right_side", stated != right_sides[variable]] += 1
                addends.append(int(stated[2:]))
            elif right_sides[variable].isdigit():
                counts["root", stated != right_sides[variable]] += 1
                value = int(stated)
            else:
                total = value + addends.pop()
                value = int(stated)
                is_wrong = value != total % 10
                counts["carry" if total >= 10 else "other_sum", is_wrong] += 1
                if is_wrong and total >= 10:
                    assert value == (total + 1) % 10
    for name, rate in USUAL_MISTAKES._asdict().items():
        total = counts[name, True] + counts[name, False]
        assert total > 400
        assert counts[name, True] / total == pytest.approx(rate, abs=4 * (rate * (1 - rate) / total) ** 0.5), name


@pytest.mark.parametrize(
    ("level", "tokens", "decisive", "detours"),
    [("0:0", 22, 0.27, 0.0), ("4:0", 46, 0.13, 0.0), ("0:2", 42, 0.145, 0.16), ("0:5", 72, 0.09, 0.22)],
)
def test_lengths_shares_and_rewards_of_demonstrations(level: str, tokens: int, decisive: float, detours: float):
    """With their mistakes, demonstrations solve a third; a wrong right-hand side may lead into the other tree."""
    task = Wandering(level=level)
    random = Random(1)
    length = 0
    num_decisive = 0
    num_detours = 0
    reward = 0.0
    for index in range(1500):
        sample = task.sample("train", index)
        response = demonstration(sample, random, USUAL_MISTAKES)
        length += num_tokens(response) + 1
        num_decisive += len(task.oracle(sample, response))
        num_detours += len(task.detours(sample, response))
        reward += task.reward(sample, response)
    assert length / 1500 == pytest.approx(tokens, abs=0.8)
    assert num_decisive / length == pytest.approx(decisive, abs=0.01)
    assert num_detours / length == pytest.approx(detours, abs=0.015)
    assert 0.29 < reward / 1500 < 0.38


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "8:5"}, r"level: must be one of 0:0, 0:1, 0:2, 0:5, 2:0, 4:0 \(filler words : detours\), which the "
                           r"base model was taught, got '8:5'; choose one of them, as text"),
        ({"level": "05"}, r"level: must be one of 0:0, .*, got '05'"),
        ({"level": 240}, r"level: must be one of 0:0, .*, got 240; choose one of them, as text"),
        ({"level": ["0:0"]}, r"level: must be one of 0:0, .*, got \['0:0'\]"),
        ({"seed": 1.5}, r"seed: must be an integer, got 1\.5; 0 is the default"),
        ({"name": "other"}, r"name: must be 'wandering', got 'other'; leave it out"),
    ],
)  # fmt: skip
def test_bad_options(options: dict, message: str):
    with pytest.raises(TaskError, match=message):
        make_task("wandering", **options)


def test_bad_problems():
    with pytest.raises(TaskError, match=r"split: must be one of 'train', 'eval', got 'test'"):
        Wandering().sample("test", 0)
    with pytest.raises(TaskError, match=r"index: must be an integer of at least 0, got -1"):
        Wandering().sample("train", -1)
    with pytest.raises(
        TaskError, match=r"options: must be arguments of the task 'wandering', got .*; it takes level, "
    ):
        make_task("wandering", levels="0:0")
