"""The variable chain: its problems against a solver of another kind, its rewards and its oracle by hand."""

import json
import re
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import Sample, Task, TaskError
from rl.tasks.chain import Chain, demonstration, first_error, read_prompt, resolve

some = settings(max_examples=60, deadline=None)
BY_HAND = Sample(
    index=0,
    prompt="f=c+2;a=7;d=b+1;c=a+1;b=4;f?",
    answer="0",
    metadata={"hops": 2, "needed": ["a", "c", "f"], "values": {"a": 7, "c": 8, "f": 0, "b": 4, "d": 5}},
)


@st.composite
def tasks(draw: st.DrawFn) -> Chain:
    num_variables = draw(st.integers(2, 26))
    least = draw(st.integers(1, num_variables - 1))
    return Chain(
        num_variables=num_variables,
        hops=(least, draw(st.integers(least, num_variables - 1))),
        max_addend=draw(st.integers(1, 9)),
        seed=draw(st.integers(-5, 5)),
    )


def solve_by_substitution(prompt: str) -> tuple[str, list[str]]:
    """The answer and the needed variables, from the question backwards (the task builds them forwards)."""
    *lines, question = prompt.split(";")
    right = dict(line.split("=") for line in lines)
    needed, expression = [question.rstrip("?")], right[question.rstrip("?")]
    while match := re.match("[a-z]", expression):
        needed.append(match[0])
        expression = right[match[0]] + expression[1:]
    return str(sum(map(int, expression.split("+"))) % 10), needed[::-1]


@given(task=tasks(), split=st.sampled_from(["train", "eval"]), index=st.integers(0, 10**9))
@some
def test_problems_are_right_and_keep_to_the_options(task: Chain, split: str, index: int):
    sample = task.sample(split, index)
    assert sample == Chain(task.num_variables, task.hops, task.max_addend, task.seed).sample(split, index)
    answer, needed = solve_by_substitution(str(sample.prompt))
    assert (sample.answer, sample.metadata["needed"]) == (answer, needed)
    assert task.hops[0] <= sample.metadata["hops"] == len(needed) - 1 <= task.hops[1]
    assignments = read_prompt(str(sample.prompt))
    assert len(assignments) == task.num_variables == str(sample.prompt).count("=")
    assert all(1 <= digit <= task.max_addend for earlier, digit in assignments.values() if earlier)
    assert json.loads(json.dumps(sample.metadata)) == sample.metadata


@given(task=tasks(), index=st.integers(0, 10**9), detours=st.integers(0, 30))
@some
def test_demonstrations_are_faultless_and_detours_are_not_decisive(task: Chain, index: int, detours: int):
    sample = task.sample("train", index)
    text = demonstration(sample, Random(index), detours)
    assert first_error(sample, text) is None
    assert task.reward(sample, text) == 1.0
    needed = sample.metadata["needed"]
    own = f"{''.join(needed[::-1])}=" + ",".join(f"{v}={sample.metadata['values'][v]}" for v in needed)[2:]
    assert text.endswith(f"{own}#{sample.answer}")
    assert (text == f"{own}#{sample.answer}") == (detours == 0)
    decisive = "".join(text[start:stop] for start, stop in task.oracle(sample, text))
    expected = ""
    for line in text.split("#")[0].split(","):
        expected += "".join(letter for letter in line[:-2] if letter in needed)
        expected += line[-1] if line[-3] in needed else ""
    assert decisive == expected


def test_every_other_variable_can_be_a_detour():
    text = demonstration(BY_HAND, Random(0), 99)
    assert text.endswith(",fca=7,c=8,f=0#0")
    parts = ["a=7", "ca=7,c=8", "b=4", "db=4,d=5"]
    assert all(f",{part}," in f",{text}" for part in parts)
    assert len(text) == len(",".join(parts)) + len(",fca=7,c=8,f=0#0")
    assert demonstration(BY_HAND, Random(0)) == "fca=7,c=8,f=0#0"


def test_the_oracle_by_hand():
    task = Chain()
    assert task.oracle(BY_HAND, "fca=7,c=1,f=0#0") == [(k, k + 1) for k in (0, 1, 2, 4, 6, 8, 10, 12)]
    assert task.oracle(BY_HAND, "db=4,d=5,ca=7#5") == [(9, 10), (10, 11), (12, 13)]
    assert task.oracle(BY_HAND, "ad=4,da=1") == [(0, 1), (6, 7), (8, 9)]
    assert task.oracle(BY_HAND, "db=4,d=5#5") == []
    assert task.oracle(BY_HAND, "a=77,a=,a7,=7,c=8") == [(14, 15), (16, 17)]
    assert task.oracle(BY_HAND, "#a=7,c=8") == []
    assert task.oracle(BY_HAND, "") == []


def test_detours_are_the_variables_and_values_that_are_not_needed():
    task = Chain()
    assert task.detours(BY_HAND, "fca=7,c=8,f=0#0") == []
    response = "db=4,d=5,fca=7,c=8,f=0#0"
    assert [response[start:end] for start, end in task.detours(BY_HAND, response)] == ["d", "b", "4", "d", "5"]
    assert task.detours(BY_HAND, response)[:2] == [(0, 1), (1, 2)]
    # Every letter and digit of a line is either decisive or part of a detour.
    marked = sorted(task.detours(BY_HAND, response) + task.oracle(BY_HAND, response))
    assert [response[start:end] for start, end in marked] == re.findall("[a-z0-9]", response)[:-1]
    assert task.detours(BY_HAND, "#d=5") == task.detours(BY_HAND, "") == []


@pytest.mark.parametrize(
    ("completion", "span", "reward"),
    [
        ("a=7,c=8,f=0#0", (12, 13), 1.0),
        ("#0", (1, 2), 1.0),
        ("f=0#1", (4, 5), 0.0),
        ("f=0#1#0", (6, 7), 1.0),
        ("f=0#0#", None, 0.0),
        ("f=0#00", None, 0.0),
        ("f=0#0 ", None, 0.0),
        ("f=0#0\n", None, 0.0),
        ("f=0#٠", None, 0.0),
        ("f=0", None, 0.0),
        ("0", None, 0.0),
        ("", None, 0.0),
    ],
)
def test_answers_are_read_strictly(completion: str, span: tuple[int, int] | None, reward: float):
    task = Chain()
    assert task.find_answer(completion) == span
    assert task.reward(BY_HAND, completion) == reward


@pytest.mark.parametrize(
    ("completion", "error"),
    [
        ("fca=7,c=8,f=0#0", None),
        ("db=4,d=5,fca=7,c=8,f=0#0", None),
        ("fca=7,c=8,f=0", "format"),
        ("fca=7;c=8,f=0#0", "format"),
        ("fca=7,c=8,f=0#0#0", "format"),
        ("fca=6,c=7,f=9#9", "lookup"),
        ("fda=7,d=8,f=0#0", "lookup"),
        ("zca=7,c=8,z=0#0", "lookup"),
        ("fcab=4,a=7,c=8,f=0#0", "lookup"),
        ("fc=8,f=0#0", "order"),
        ("fca=7,f=0#0", "order"),
        ("fca=7,cf=8#8", "order"),
        ("fca=7,c=9,f=1#1", "sum"),
        ("fca=7,c=8,f=0#8", "end"),
        ("fca=7,c=8#8", "end"),
        ("fca=7,c=8,f=0,b=4#4", "end"),
        ("fca=7,c=8,f=0,b=4#0", "end"),
    ],
)
def test_the_first_error_is_named(completion: str, error: str | None):
    assert first_error(BY_HAND, completion) == error


def test_splits_are_streams_of_their_own():
    """Short problems so that a repeated stream would show; 2 000 of each have nothing in common."""
    task = Chain(num_variables=8, hops=(2, 2))
    prompts = {split: {str(task.sample(split, index).prompt) for index in range(2_000)} for split in ("train", "eval")}
    assert len(prompts["train"]) == len(prompts["eval"]) == 2_000
    assert not prompts["train"] & prompts["eval"]
    other = Chain(num_variables=8, hops=(2, 2), seed=1)
    assert other.sample("train", 0) != task.sample("train", 0)


def test_a_problem_never_changes():
    sample = Chain(num_variables=5, hops=(2, 2), max_addend=9, seed=1).sample("train", 0)
    assert (sample.prompt, sample.answer, sample.index) == ("s=f+9;x=9;v=f+2;o=s+3;f=5;o?", "7", 0)
    assert resolve(read_prompt("a=7;c=a+8;f=c+9;f?")) == {"a": 7, "c": 5, "f": 4}


def test_it_is_a_task_whose_options_may_come_from_yaml():
    assert isinstance(Chain(), Task)
    assert Chain().size is None
    assert Chain(hops=[2, 3]) == Chain(hops=(2, 3))
    assert hash(Chain(hops=[2, 3])) == hash(Chain(hops=(2, 3)))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_variables": 1}, r"num_variables: must be an integer from 2 to 26, got 1; 6 is the default"),
        ({"num_variables": 27}, r"num_variables: must be .* got 27"),
        ({"num_variables": 5.0}, r"num_variables: must be .* got 5\.0"),
        ({"max_addend": 10}, r"max_addend: must be an integer from 1 to 9, got 10"),
        ({"seed": "x"}, r"seed: must be an integer, got 'x'; 0 is the default"),
        ({"hops": (0, 2)}, r"hops: must be two integers 1 <= least <= greatest <= 5 .* got \(0, 2\); use hops="),
        ({"hops": (3, 2)}, r"hops: must be .* got \(3, 2\)"),
        ({"hops": (2, 8)}, r"hops: must be .* got \(2, 8\)"),
        ({"hops": 3}, r"hops: must be .* got 3"),
        ({"hops": (1.0, 2)}, r"hops: must be .* got \(1\.0, 2\)"),
        ({"name": "other"}, r"name: must be 'chain', got 'other'; leave it out"),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises(TaskError, match=message):
        Chain(**options)


@pytest.mark.unchecked
def test_bad_requests():
    with pytest.raises(TaskError, match=r"split: must be one of 'train', 'eval', got 'test'; choose one of them"):
        Chain().sample("test", 0)
    for index in (-1, 1.5, True):
        with pytest.raises(TaskError, match=r"index: must be an integer of at least 0, got"):
            Chain().sample("train", index)


def test_an_answer_inside_the_thinking_is_not_paid():
    task = Chain()
    assert task.find_answer("<think>f=0#0") is None
    assert task.reward(BY_HAND, "<think>f=0#0") == 0.0
    assert task.reward(BY_HAND, "<think>f=0</think>#0") == 1.0
    assert task.reward(replace(BY_HAND, opening="<think>"), "f=0#0") == 0.0
