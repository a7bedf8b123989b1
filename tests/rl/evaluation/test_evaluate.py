"""A policy measured on fresh problems: the figures are those of a plain loop, and say how sure they are."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from rl import ConfigError, Evaluation, PolicyError, evaluate
from rl.evaluation.significance import wilson_interval
from tests.fixtures.policies import FAMILIES, Digits, alphabet, tiny_policy

TOKENIZER = alphabet()


def measured(model=None, task=None, **settings) -> Evaluation:
    settings = {"num_problems": 5, "max_response_tokens": 8} | settings
    return evaluate(model or tiny_policy(), TOKENIZER, task or Digits(), **settings)


def greedy(model, prompt: str) -> str:
    """One token after the other, no padding, no cache."""
    ids = TOKENIZER(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + 8:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:
            return str(TOKENIZER.decode(ids[start:-1]))
    return str(TOKENIZER.decode(ids[start:]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_greedy_figures_are_those_of_a_plain_loop(family: str, batch_size: int):
    model, task = tiny_policy(family), Digits()
    result = measured(model, batch_size=batch_size)
    expected = [greedy(model, str(task.sample("eval", index).prompt)) for index in range(5)]
    assert [row["completion"] for row in result.responses] == expected
    rewards = [task.reward(task.sample("eval", 0), text) for text in expected]
    assert result.reward == pytest.approx(sum(rewards) / 5)
    assert result.answer_share == pytest.approx(sum(task.find_answer(text) is not None for text in expected) / 5)
    assert [row["index"] for row in result.responses] == list(range(5))


def test_sampling_is_the_same_however_it_is_cut_and_another_with_another_seed():
    runs = [measured(temperature=1.0, samples=3, batch_size=size) for size in (1, 4, 64)]
    texts = [[row["completion"] for row in run.responses] for run in runs]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0][:3])) > 1
    other = measured(temperature=1.0, samples=3, seed=1)
    assert [row["completion"] for row in other.responses] != texts[0]
    first = measured(temperature=1.0, samples=2, num_problems=2)
    assert [row["completion"] for row in first.responses] == [texts[0][k] for k in (0, 1, 3, 4)]


def test_several_samples_give_the_best_of_them_and_an_interval_over_problems():
    result = measured(temperature=1.0, samples=4, num_problems=6)
    rewards = torch.tensor([row["reward"] for row in result.responses], dtype=torch.float64).view(6, 4)
    assert 0 < float(rewards.mean()) < 1, "a batch that says something"
    assert result.best_of == pytest.approx(float((rewards.max(1).values).mean()))
    half = 1.959964 * float(rewards.mean(1).std()) / math.sqrt(3)  # six problems, but the task has only three
    assert (result.low, result.high) == pytest.approx((result.reward - half, result.reward + half))
    assert result.best_of >= result.reward


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (5, 10, (0.2366, 0.7634)), (81, 263, (0.2553, 0.3662))],
)
def test_wilson(successes: int, trials: int, expected: tuple[float, float]):
    """The last pair is Newcombe's worked example (Statistics in Medicine 17, 1998, method 3)."""
    assert wilson_interval(successes, trials) == pytest.approx(expected, abs=1e-4)


def test_wilson_solves_its_equation():
    """Its ends are the shares p with |8/10 - p| = z sqrt(p (1 - p) / 10)."""
    for end in wilson_interval(8, 10):
        assert abs(0.8 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 10))


def test_one_verdict_of_0_or_1_has_wilsons_interval_and_other_rewards_a_normal_one():
    result = measured()
    assert (result.low, result.high) == wilson_interval(result.reward * 3, 3), "three problems, two of them twice"

    class Length(Digits):
        def reward(self, sample, completion):
            return len(completion) / 3

    other = measured(task=Length())
    rewards = torch.tensor([row["reward"] for row in other.responses], dtype=torch.float64)
    assert other.high - other.low == pytest.approx(2 * 1.959964 * float(rewards.std()) / math.sqrt(3))
    alone = measured(task=Length(), num_problems=1)
    assert (alone.low, alone.high) == (-math.inf, math.inf)
    plain = json.loads(json.dumps(alone.summary()), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert plain["low"] is None
    assert plain["high"] is None
    assert "responses" not in plain


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({name: value}, f"{name}: must be at least 1, got {value}; see rl.evaluate")
          for name in ("num_problems", "samples", "batch_size", "max_prompt_tokens", "max_response_tokens")
          for value in (0, -1, 1.5)),
        ({"temperature": -0.1}, "temperature: must be finite and at least 0, got -0.1; 0 is greedy decoding"),
        ({"temperature": float("nan")}, "temperature: must be finite and at least 0, got nan"),
        ({"temperature": float("inf"), "samples": 2}, "temperature: must be finite and at least 0, got inf"),
        ({"samples": 2}, "samples: must be 1 at temperature 0, got 2; greedy samples are all the same"),
        ({"split": "test"}, "split: must be one of train, eval, got 'test'; 'eval' holds fresh problems"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        measured(**settings)


def test_a_prompt_that_does_not_fit_is_refused():
    with pytest.raises(PolicyError, match=r"prompt: sample 0 must have at most 4 tokens \(max_prompt_tokens=4\)"):
        measured(max_prompt_tokens=4)


def test_progress_is_told():
    seen = []
    measured(samples=2, temperature=1.0, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_dropout_is_off_and_the_model_is_left_as_it_was():
    model = tiny_policy("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    expected = [row["completion"] for row in measured(model).responses]
    model.train()
    model.transformer.h.eval()
    before = [module.training for module in model.modules()]
    assert [row["completion"] for row in measured(model).responses] == expected
    assert [module.training for module in model.modules()] == before


def test_generation_settings_of_the_model_have_no_say():
    model = tiny_policy()
    expected = [row["completion"] for row in measured(model).responses]
    model.generation_config = own = GenerationConfig(eos_token_id=1, repetition_penalty=50.0, do_sample=True, top_k=3)
    assert [row["completion"] for row in measured(model).responses] == expected
    assert model.generation_config is own


def test_a_figure_can_be_read():
    shown = repr(replace(measured(), reward=0.5, low=0.25, high=0.75))
    assert shown.startswith("Evaluation(reward 0.500 [0.250, 0.750] on 5 problems, best of 1")


@pytest.mark.parametrize("batch_size", [2, 3, 4, 7, 64])
def test_all_samples_of_a_problem_are_judged_in_one_call(batch_size: int):
    sizes = []

    class Counting(Digits):
        def batch_rewards(self, samples, completions):
            for sample in samples:
                assert sum(other.index == sample.index for other in samples) == 3
            sizes.append(len(samples))
            return [Digits.reward(self, sample, text) for sample, text in zip(samples, completions, strict=True)]

    options = {"num_problems": 4, "samples": 3, "temperature": 1.0, "max_response_tokens": 6}
    found = evaluate(tiny_policy(), alphabet(), Counting(), batch_size=batch_size, **options)
    assert sum(sizes) == 12
    assert found == evaluate(tiny_policy(), alphabet(), Digits(), **options)
