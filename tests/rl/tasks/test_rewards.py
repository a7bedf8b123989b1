"""No reward reaches training that is not a finite number for its own response."""

from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from rl import ConfigError, RewardError, Sample
from rl.tasks.rewards import checked_rewards, function_name, load_function

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


def test_an_asynchronous_function_is_refused_without_a_warning():
    async def late(samples, completions):
        return [1.0] * len(samples)

    with pytest.raises(RewardError, match=r"must return a list of 3 numbers, got a coroutine"):
        checked_rewards(late, SAMPLES, TEXTS, name="late")


def test_an_exception_is_told_with_its_batch_and_kept():
    def broken(samples, completions):
        return [1 / (len(text) - 1) for text in completions]

    message = r"reward 'broken': must return numbers for a batch of 3 responses \(samples 4, 9\), got ZeroDivisionError"
    with pytest.raises(RewardError, match=message) as caught:
        checked_rewards(broken, SAMPLES, TEXTS, name="broken")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


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
        (f"{broken}:f", r"must name code that can be imported, got .*, which raised OSError: no such disk; the cause"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_function(path)
