"""No reward reaches training that is not a finite number for its own response."""

import asyncio
import json
import re
import sys
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from rl import ConfigError, RewardError, Sample
from rl.tasks.rewards import WeightedReward, checked_rewards, function_name, load_function, weighted_rewards

SAMPLES = [Sample(index, f"prompt {index}", str(index)) for index in (4, 4, 9)]
TEXTS = ["four", "4", "x" * 500]


def run(returned):
    return checked_rewards(lambda samples, completions: returned, SAMPLES, TEXTS, name="mine")


@pytest.mark.parametrize(
    "returned",
    [[1, 0.5, -2], (1, 0.5, -2), torch.tensor([1, 0.5, -2]), np.array([1, 0.5, -2]), [True, Fraction(1, 2), -2],
     [torch.tensor(1.0), np.float32(0.5), np.int64(-2)], [np.bool_(True), 0.5, torch.tensor(-2)]],
)  # fmt: skip
def test_numbers_become_float32(returned):
    rewards = run(returned)
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [1, 0.5, -2]


def test_the_function_gets_lists_of_its_own():
    samples, texts = list(SAMPLES), list(TEXTS)

    def greedy(samples: list, completions: list):
        lengths = [float(len(text)) for text in completions]
        samples.clear()
        completions.clear()
        return lengths

    assert checked_rewards(greedy, samples, texts, name="greedy").tolist() == [4, 1, 500]
    assert (samples, texts) == (SAMPLES, TEXTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39, 10**400])
def test_rewards_that_are_not_finite(value: float):
    message = r"reward 'mine': must return a finite number for response 2 \(sample 9: 'x{77}\.\.\.'\), got .*; guard"
    with pytest.raises(RewardError, match=message):
        run([1, 0, value])


@pytest.mark.parametrize("value", [None, "1", Decimal(1), [1.0], 1j, torch.ones(2)])
def test_rewards_that_are_no_numbers(value: object):
    with pytest.raises(RewardError, match=r"a number for response 1 \(sample 4: '4'\), got .*; return a float"):
        run([1, value, 0])


@pytest.mark.parametrize("returned", [None, 1.0, "abc", {0: 1, 1: 1, 2: 1}, iter([1, 1, 1]), torch.tensor(1.0)])
def test_returns_that_are_no_lists(returned: object):
    with pytest.raises(RewardError, match=r"reward 'mine': must return a list of 3 numbers, got .*; end it with"):
        run(returned)


@pytest.mark.parametrize("returned", [[], [1, 1], [1, 1, 1, 1]])
def test_returns_of_another_length(returned: list):
    with pytest.raises(RewardError, match=rf"return 3 numbers, one for each response, got {len(returned)}; return"):
        run(returned)


def test_samples_and_completions_belong_together():
    with pytest.raises(RewardError, match=r"completions: must be one for each of the 3 samples, got 2; repeat"):
        checked_rewards(lambda s, c: [0.0] * 3, SAMPLES, TEXTS[:2], name="mine")


def test_a_function_from_a_file(tmp_path: Path):
    file = tmp_path / "torch.py"  # takes no package's place
    file.write_text("def score(samples, completions):\n    return [len(text) for text in completions]\n")
    score = load_function(f"{file}:score")
    assert function_name(score) == "score"
    assert checked_rewards(score, SAMPLES, TEXTS, name="score").tolist() == [4, 1, 500]
    file.write_text("def score(samples, completions):\n    return [0 for _ in completions]\n# changed\n")
    assert load_function(f"{file}:score")(SAMPLES, TEXTS) == [0, 0, 0]


def test_a_function_from_a_module():
    assert load_function("rl.tasks.rewards:load_function") is load_function


@pytest.mark.unchecked
@pytest.mark.parametrize("path", ["", "math", "math:", ":sqrt", "math:not a name", 3, None])
def test_places_of_another_form(path: object):
    with pytest.raises(ConfigError, match=r"reward: must have the form 'package.module:function' or"):
        load_function(path)


def test_places_where_nothing_is(tmp_path: Path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise OSError('no such disk')\n")
    for path, message in (
        ("math:no_such", r"must name a function of math, got 'no_such', which is no such name; define it as"),
        ("math:pi", r"must name a function of math, got 'pi', which is a float"),
        ("no_such_package.part:f", r"module that can be imported, got .*, where 'no_such_package' is missing; install"),
        ("a/b:f", r"must name a module before the colon, got 'a/b:f'; write package.module:function"),
        (f"{tmp_path}/none.py:f", r"must name a file that exists, got .*none.py:f' with no file .*; check the path"),
        (
            f"{broken}:f",
            r"code that can be imported, got .*, which raised OSError: no such disk, at .*broken.py, line 1, in <mod",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load_function(path)


# Coroutines ------------------------------------------------------------------------------------------------


async def late(samples, completions):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


def listed(samples, completions):
    async def one(text: str) -> float:
        return float(len(text))

    return [one(text) for text in completions]


class Judge:
    async def __call__(self, samples, completions):
        return await late(samples, completions)


@pytest.mark.parametrize("function", [late, listed, Judge(), partial(late)])
def test_coroutines_are_awaited(function):
    assert checked_rewards(function, SAMPLES, TEXTS, name="late").tolist() == [4, 1, 500]


def test_coroutines_are_awaited_inside_a_running_loop_as_in_a_notebook():
    async def cell() -> list[float]:
        return checked_rewards(late, SAMPLES, TEXTS, name="late").tolist()

    assert asyncio.run(cell()) == [4, 1, 500]


def test_coroutines_of_several_functions_run_at_the_same_time():
    arrived = []

    def waiting(name: str, for_whom: str):
        async def judge(samples, completions):
            arrived.append(name)
            while for_whom not in arrived:
                await asyncio.sleep(0)
            return [1.0] * len(samples)

        return judge

    both = [WeightedReward("a", waiting("a", "b")), WeightedReward("b", waiting("b", "a"), 2.0)]
    assert weighted_rewards(both, SAMPLES, TEXTS).totals.tolist() == [3.0, 3.0, 3.0]


def test_what_cannot_be_awaited_is_named():
    async def stream(samples, completions):
        yield 1.0

    with pytest.raises(RewardError, match=r"must return a list of 3 numbers, got a async_generator of '.*stream'"):
        checked_rewards(stream, SAMPLES, TEXTS, name="stream")


# Errors ----------------------------------------------------------------------------------------------------


def of_line(needle: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if line.endswith(needle)]
    return number


def broken(samples, completions):
    return [1 / (len(text) - 1) for text in completions]  # divides by zero


async def broken_late(samples, completions):
    raise ValueError("v" * 500)  # raises late


def broken_below(samples, completions):
    return [json.loads(text) for text in completions]  # fails in json


def broken_twice(samples, completions):
    try:
        return [{}[text] for text in completions]  # the first cause
    except KeyError as error:
        raise RuntimeError("no such text") from error


def leaving(samples, completions):
    sys.exit(3)  # leaves


class UnreadableError(Exception):
    def __str__(self):
        raise LookupError


def broken_text(samples, completions):
    raise UnreadableError  # no text


async def broken_group(samples, completions):
    async with asyncio.TaskGroup() as group:
        group.create_task(broken_late(samples, completions))


@pytest.mark.parametrize(
    ("function", "kind", "parts"),
    [
        (broken, ZeroDivisionError, ["ZeroDivisionError: division by zero, at {file}, line {divides by zero}, in"]),
        (broken_late, ValueError, ["ValueError: " + "v" * 500, "at {file}, line {raises late}, in broken_late"]),
        (
            broken_below,
            ValueError,
            ["JSONDecodeError: ", "{file}, line {fails in json}, in", "(raised at "],
        ),
        (broken_twice, RuntimeError, ["RuntimeError: no such text", "caused by KeyError: 'four'", "{the first cause}"]),
        (leaving, SystemExit, ["SystemExit: 3", "line {leaves}, in leaving"]),
        (
            broken_text,
            UnreadableError,
            ["UnreadableError: (its text raised LookupError), at {file}, line {no text}"],
        ),
        (broken_group, ExceptionGroup, ["ExceptionGroup", "ValueError: vvv", "line {raises late}, in broken_late"]),
    ],
)
def test_an_exception_is_told_with_its_text_file_and_line_and_kept(function, kind: type, parts: list[str]):
    with pytest.raises(RewardError) as caught:
        checked_rewards(function, SAMPLES, TEXTS, name="mine")
    message = str(caught.value)
    assert message.startswith("reward 'mine': must return numbers for a batch of 3 responses (samples 4, 9), got ")
    assert message.endswith("; correct it: it is called as reward(samples, completions)")
    for part in parts:
        expected = re.sub(r"\{([^}]*)\}", lambda m: __file__ if m[1] == "file" else str(of_line(f"# {m[1]}")), part)
        assert expected in message
    assert isinstance(caught.value.__cause__, kind)


# Several functions -----------------------------------------------------------------------------------------


def length(samples, completions):
    return [float(len(text)) for text in completions]


def odd_samples(samples, completions):
    return [2.0 if sample.index % 2 else None for sample in samples]


def test_several_functions_are_summed_with_their_weights_where_they_apply():
    both = [WeightedReward("length", length, 0.5), WeightedReward("odd", odd_samples, -3.0)]
    assert weighted_rewards(both, SAMPLES, TEXTS).totals.tolist() == [2.0, 0.5, 244.0]


def test_the_rewards_of_each_function_are_kept_before_their_weights():
    found = weighted_rewards(
        [WeightedReward("length", length, 0.5), WeightedReward("odd", odd_samples)], SAMPLES, TEXTS
    )
    assert found.names == ("length", "odd")
    assert found.parts[:, 0].tolist() == [4.0, 1.0, 500.0]
    assert found.parts[:, 1].isnan().tolist() == [True, True, False]


def test_some_function_must_apply_to_every_response():
    never = [WeightedReward("odd", odd_samples), WeightedReward("too", odd_samples)]
    message = r"reward: at least one function must apply to response 0 \(sample 4: 'four'\), got None from all of 'odd'"
    with pytest.raises(RewardError, match=message + ", 'too'; return 0.0"):
        weighted_rewards(never, SAMPLES, TEXTS)


def test_a_sum_beyond_the_range_is_refused():
    large = [WeightedReward("a", length, 1e38), WeightedReward("b", length, 1e38)]
    with pytest.raises(RewardError, match=r"reward 'a, b': must return a finite number for response 0"):
        weighted_rewards(large, SAMPLES, TEXTS)
