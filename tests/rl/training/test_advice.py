"""A run that cannot learn is told so after its first steps, with what to change; a run that learns is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rl import CreditConfig, PPOConfig, PPOTrainer
from rl.training.advice import learning_warning
from tests.fixtures.policies import Digits, alphabet, tiny_policy

GROUP = PPOConfig(advantage="group", num_prompts=2, group_size=4)
ROW = {"answer_share": 0.5, "reward_min": 0.0, "reward_max": 1.0, "zero_variance_share": 0.5, "truncated_share": 0.0,
       "raised_share": 0.4}  # fmt: skip


def advice(config: PPOConfig = GROUP, **values: float) -> str | None:
    return learning_warning([ROW | values] * 5, config)


def test_runs_that_learn_are_left_alone():
    assert advice() is None
    assert advice(reward_min=-1.0, zero_variance_share=0.9) is None
    assert learning_warning([ROW | {"zero_variance_share": 1.0}] * 4 + [ROW], GROUP) is None
    assert learning_warning([], GROUP) is None
    assert learning_warning([{"step": 1}], GROUP) is None
    # a critic learns from differences between problems
    assert advice(PPOConfig(), zero_variance_share=1.0) is None


@pytest.mark.parametrize("config", [GROUP, PPOConfig(num_prompts=2)])
def test_no_answer_and_equal_rewards(config: PPOConfig):
    found = advice(config, answer_share=0, reward_max=0, zero_variance_share=1, truncated_share=0.75)
    assert found == (
        "reward: must differ between responses to teach anything, got reward 0 for all 40 responses of the first 5 "
        "steps, and no response states an answer; show the model in the prompt how to state its answer (such as "
        "\\boxed{7}, <answer>7</answer> or #### 7), or give the task the pattern of its answers; 75% of the responses "
        "were cut off: raise max_response_tokens=256"
    )


def test_equal_rewards_with_answers():
    found = advice(reward_max=0, zero_variance_share=1)
    assert found is not None
    assert "got reward 0 for all 40 responses of the first 5 steps; give the task easier problems" in found
    assert "raise group_size (4) or temperature (1)" in found
    found = advice(reward_min=1, zero_variance_share=1)
    assert found is not None
    assert found.endswith("got reward 1 for all 40 responses of the first 5 steps; give the task harder problems")
    found = advice(zero_variance_share=1)
    assert found is not None
    assert "got no difference between the responses to any problem in all 40 responses" in found


def test_a_kl_in_the_reward_is_no_difference_and_a_penalty_is():
    """The KL makes the rewards of a group differ a little, and teaches nothing about the task."""
    found = advice(replace(GROUP, kl_coefficient=0.1), reward_max=0, zero_variance_share=0.2)
    assert found is not None
    assert "got reward 0 for all 40 responses" in found
    penalty = replace(GROUP, missing_eos_penalty=0.5)
    assert advice(penalty, reward_max=0, truncated_share=0.5) is None
    assert advice(penalty, reward_max=0, truncated_share=1.0) is not None


def test_credit_without_an_answer():
    found = advice(answer_share=0, raised_share=0)
    assert found is not None
    assert found.startswith(
        "credit: rule 'flow' must find stated answers to weigh tokens, got none in all 40 responses"
    )
    assert advice(replace(GROUP, credit=CreditConfig(rule="uniform")), answer_share=0, raised_share=0) is None
    assert advice(answer_share=0, raised_share=0.4) is None


class Mute(Digits):
    def find_answer(self, completion):
        return None

    def reward(self, sample, completion):
        return 0.0


@pytest.mark.parametrize("steps", [2, 7])
def test_the_run_says_it_once(steps: int, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    config = replace(GROUP, steps=steps, max_response_tokens=6)
    for progress in (True, False):
        PPOTrainer(tiny_policy(), alphabet(), task=Mute(), config=config, progress=progress).train()
    said = f"got reward 0 for all {8 * min(steps, 5)} responses of the first {min(steps, 5)} steps, and no response"
    assert capsys.readouterr().err.count(said) == 1
    assert caplog.text.count(said) == 1


def test_the_progress_line_shows_the_share_of_answers(capsys: pytest.CaptureFixture[str]):
    config = replace(GROUP, steps=1, max_response_tokens=6)
    row = PPOTrainer(tiny_policy(), alphabet(), task=Digits(), config=config).train()[0]
    assert f"answers {row['answer_share']:.0%}" in capsys.readouterr().err
