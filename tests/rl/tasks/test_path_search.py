"""Path search: its trees, its walks, its marks by a slow reading, and its rewards by hand."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import Task, TaskError, make_task
from rl.base_models.path_search_recipe import PathSearchRecipe
from rl.tasks.base import DetourTask
from rl.tasks.path_search import NAMES, USUAL_WRONG_STEPS, PathSearch, demonstration
from tests.reference import rl_tasks as slow

some = settings(max_examples=60, deadline=None)
VOCABULARY = PathSearchRecipe.vocabulary
BY_HAND = PathSearch(seed=1).sample("train", 0)


def test_it_is_a_task_that_knows_its_detours():
    assert isinstance(PathSearch(), Task)
    assert isinstance(PathSearch(), DetourTask)
    assert make_task("pathsearch", oracle="last", seed=3) == PathSearch("last", seed=3) != PathSearch(seed=3)
    assert repr(PathSearch("last")) != repr(PathSearch())
    assert PathSearch().size is None


@some
@given(st.integers(0, 10**9), st.integers(0, 99), st.sampled_from(["train", "eval"]))
def test_problems_are_binary_trees_with_a_deep_leaf_as_goal(index: int, seed: int, split: str):
    sample = PathSearch(seed=seed).sample(split, index)
    assert PathSearch(seed=seed).sample(split, index) == sample
    assert json.loads(json.dumps(sample.metadata)) == sample.metadata
    prompt = str(sample.prompt)
    assert len(VOCABULARY.token_ids(prompt)) == 25
    edges, question = prompt.split("?")
    pairs = [tuple(line.split(">")) for line in edges.split(";")[:-1]]
    parents = {child: parent for parent, child in pairs}
    root, goal = question[0], question[1]
    assert len(pairs) == 7
    assert set(parents) | {root} == set(NAMES)
    assert root not in parents
    assert all(list(parents.values()).count(node) <= 2 for node in NAMES)
    assert goal not in parents.values()
    path = goal
    while path[-1] != root:
        path += parents[path[-1]]
    assert path == sample.answer
    assert len(path) >= 3


def test_splits_and_seeds_are_different_streams():
    first = {str(PathSearch().sample("train", index).prompt) for index in range(500)}
    assert len(first) > 490
    assert not first & {str(PathSearch().sample("eval", index).prompt) for index in range(500)}
    assert not first & {str(PathSearch(seed=1).sample("train", index).prompt) for index in range(500)}


@some
@given(st.integers(0, 10**6))
def test_demonstrations_without_wrong_steps_find_the_goal_and_go_on(index: int):
    task = PathSearch()
    sample = task.sample("train", index)
    response = demonstration(sample, Random(index))
    assert response == demonstration(sample, Random(index))
    assert task.reward(sample, response) == 1.0
    trace, _, path = response.partition("#")
    walks = trace.split(",")
    assert 4 <= len(walks) <= 9
    assert path == sample.answer
    assert path[::-1] in walks
    edges = {tuple(edge) for edge in sample.metadata["edges"]}
    parents = {parent for parent, _ in edges}
    for walk in walks:
        assert walk[0] == sample.metadata["root"]
        assert walk[-1] not in parents
        assert {(walk[i], walk[i + 1]) for i in range(len(walk) - 1)} <= edges
    # Every step is either decisive or a detour.
    marked = len(task.oracle(sample, response)) + len(task.detours(sample, response))
    assert marked == sum(len(walk) - 1 for walk in walks)


@some
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_marks_are_those_of_a_slow_reading(index: int, rate: float):
    task = PathSearch()
    sample = task.sample("train", index)
    response = demonstration(sample, Random(index), rate)
    used, last, unused = slow.path_marks(response)
    assert task.oracle(sample, response) == used
    assert PathSearch("last").oracle(sample, response) == last
    assert task.detours(sample, response) == PathSearch("last").detours(sample, response) == unused
    assert used, "the path repeats a walk"
    assert len(last) == len({response[start - 1 : end] for start, end in used})
    assert len(VOCABULARY.token_ids(response)) < 64


@some
@given(st.text("ABCG,#>", max_size=40))
def test_marks_of_any_text_are_those_of_a_slow_reading(text: str):
    used, last, unused = slow.path_marks(text)
    assert PathSearch().oracle(BY_HAND, text) == used
    assert PathSearch("last").oracle(BY_HAND, text) == last
    assert PathSearch().detours(BY_HAND, text) == unused


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("CGB#BGC", 1.0),
        ("#BGC", 1.0),
        ("CGB#BGC,", 0.0),
        ("CGB#BGC ", 0.0),
        ("CGB#BC", 0.0),
        ("CGB#GC", 0.0),
        ("CGB#BG", 0.0),
        ("CGB#B", 0.0),
        ("CGB#CGB", 0.0),
        ("CGB#BGCGC", 0.0),
        ("CGB#", 0.0),
        ("CGB", 0.0),
        ("", 0.0),
        ("<think>CGB#BGC", 0.0),
    ],
)
def test_only_a_path_of_the_tree_is_rewarded(completion: str, reward: float):
    assert BY_HAND.prompt == "A>F;H>E;C>A;C>G;G>B;F>H;A>D;?CB:"
    assert PathSearch().reward(BY_HAND, completion) == reward


def test_the_answer_is_the_path():
    assert PathSearch().find_answer("CGB#BGC") == (4, 7)
    assert PathSearch().find_answer("CGB#BGC#") is None
    assert PathSearch().find_answer("CGB") is None


def test_lengths_shares_and_rewards_of_demonstrations():
    task = PathSearch()
    random = Random(1)
    reward = 0.0
    length = 0
    counts = [0, 0, 0]
    for index in range(1500):
        sample = task.sample("train", index)
        response = demonstration(sample, random, USUAL_WRONG_STEPS)
        reward += task.reward(sample, response)
        length += len(VOCABULARY.token_ids(response)) + 1
        for position, spans in enumerate(slow.path_marks(response)):
            counts[position] += len(spans)
    assert reward / 1500 == pytest.approx(0.345, abs=0.04)
    assert length / 1500 == pytest.approx(26.5, abs=0.8)
    shares = [count / length for count in counts]
    assert shares == pytest.approx([0.148, 0.087, 0.288], abs=0.012)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"oracle": "first"}, r"oracle: must be one of all, last, got 'first'; 'all' marks every occurrence"),
        ({"oracle": None}, r"oracle: must be one of all, last, got None"),
        ({"seed": True}, r"seed: must be an integer, got True; 0 is the default"),
        ({"name": "other"}, r"name: must be 'pathsearch', got 'other'; leave it out"),
        ({"level": "0:0"}, r"options: must be arguments of the task 'pathsearch', got level .*; it takes oracle, seed"),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises(TaskError, match=message):
        make_task("pathsearch", **options)
