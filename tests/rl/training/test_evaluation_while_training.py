"""Evaluations during a run: on held-out problems, without a trace in what is learned; the best policy is kept."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from rl import CheckpointError, CreditConfig, LoraConfig, PolicyError, PPOConfig, PPOTrainer, Sample, evaluate
from rl.commands.run_file import policy_folder
from rl.training.checkpoint import find_checkpoints, read_state
from rl.training.tracking import Display
from tests.fixtures.policies import Digits, alphabet, tiny_policy
from tests.fixtures.rl_commands import SHORT, SMALL, invoke

SETTINGS = PPOConfig(
    steps=4, num_prompts=3, group_size=2, max_response_tokens=8, learning_rate=1e-2, advantage="rloo",
    lora=LoraConfig(rank=2), credit=CreditConfig(rule="uniform"), save_every=1, keep_checkpoints=1,
    evaluate_every=1, evaluation_problems=5, entropy_coefficient=0.5,
)  # fmt: skip


@dataclass(frozen=True)
class Counted(Digits):
    """Rewards that draw from a global generator, and evaluations whose rewards are given in advance."""

    of_evaluations: tuple[float, ...] = ()

    def sample(self, split: str, index: int) -> Sample:
        return replace(super().sample(split, index), answer=split)

    def reward(self, sample: Sample, completion: str) -> float:
        noise = 1e-3 * random.random()
        if sample.answer == "eval" and self.of_evaluations:
            return self.of_evaluations[COUNT[0] // SETTINGS.evaluation_problems % len(self.of_evaluations)] + count()
        return super().reward(sample, completion) + noise


COUNT = [0]


def count() -> float:
    COUNT[0] += 1
    return 0.0


def trainer(config: PPOConfig = SETTINGS, output: Path | None = None, task: Any = None, **options: Any) -> PPOTrainer:
    COUNT[0] = 0
    random.seed(3)
    return PPOTrainer(
        tiny_policy(), alphabet(), task=task or Counted(), config=config, output=output, progress=False, **options
    )


def weights(run: PPOTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.policy.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def without_clocks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if "second" not in name and "overhead" not in name} for row in rows
    ]


def test_evaluations_are_those_of_evaluate_and_change_nothing_that_is_learned():
    config = replace(SETTINGS, evaluate_every=2)
    run = trainer(config, task=Digits())
    rows = run.train()
    assert ["eval_reward" in row for row in rows] == [False, True, False, True]
    expected = evaluate(
        run.policy.causal_lm, run.tokenizer, run.task, num_problems=5, max_response_tokens=8, seed=config.seed
    )
    assert rows[-1]["eval_reward"] == expected.reward
    assert (rows[-1]["eval_low"], rows[-1]["eval_high"]) == (expected.low, expected.high)
    assert rows[-1]["evaluation_seconds"] > 0

    evaluated = trainer()
    evaluated.train()
    plain = trainer(replace(SETTINGS, evaluate_every=0))
    plain.train()
    assert same(weights(evaluated), weights(plain))


def test_the_best_policy_is_kept_and_named(tmp_path: Path):
    run = trainer(output=tmp_path, task=Counted(of_evaluations=(0.1, 0.7, 0.3, 0.7)))
    logits = []
    ids = torch.tensor([[3, 30, 39, 5]])
    for _ in range(4):
        run.step()
        with torch.no_grad():
            logits.append(run.policy.causal_lm(ids).logits)
    assert [row["eval_best_step"] for row in run.history] == [1, 2, 2, 2], "the first of two equal ones"
    assert run.history[-1]["eval_best_reward"] == pytest.approx(0.7)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-000004"], "the best is none of them"
    assert read_state(tmp_path / "best")["position"]["step"] == 2
    loaded = PeftModel.from_pretrained(tiny_policy(), str(policy_folder(tmp_path / "best")))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, logits[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[1], logits[3], atol=1e-3)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_run_stops_when_its_patience_is_out_and_goes_on_with_more(tmp_path: Path, capsys: pytest.CaptureFixture):
    rewards = (0.5, 0.4, 0.5, 0.9, 0.1, 0.2)
    config = replace(SETTINGS, steps=6, patience=2)
    run = trainer(config, tmp_path, task=Counted(of_evaluations=rewards))
    run._display.enabled = True
    assert [row["step"] for row in run.train()] == [1, 2, 3]
    assert "stopped after step 3: 2 evaluations in a row without a reward above 0.500, that of step 1" in (
        capsys.readouterr().err
    )
    again = trainer(config, tmp_path, task=Counted(of_evaluations=rewards), resume=True)
    assert len(again.train()) == 3, "still out of patience"
    longer = trainer(replace(config, patience=3), tmp_path, task=Counted(of_evaluations=rewards), resume=True)
    COUNT[0] = 3 * SETTINGS.evaluation_problems
    assert [row["eval_best_step"] for row in longer.train()] == [1, 1, 1, 4, 4, 4]


@pytest.mark.parametrize("schedule", ["constant", "reduce_lr_on_plateau"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_run_has_the_same_evaluations_best_and_learning_rates(cut: int, schedule: Any, tmp_path: Path):
    options = {"patience": 0, "factor": 0.5, "threshold": 1.0} if schedule != "constant" else {}
    config = replace(
        SETTINGS, keep_checkpoints=9, lr_schedule=schedule, lr_schedule_options=options, evaluation_temperature=1.0,
        evaluation_samples=2,
    )  # fmt: skip
    whole = trainer(config, tmp_path / "whole")
    whole.train()
    folder = tmp_path / "cut"
    folder.mkdir()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-00000{cut}", folder / f"checkpoint-00000{cut}")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", folder)
    resumed = trainer(config, folder, resume=True)
    resumed.train()
    assert same(weights(whole), weights(resumed))
    assert without_clocks(whole.history) == without_clocks(resumed.history)
    assert whole.position == replace(resumed.position)
    rates = [row["learning_rate"] for row in whole.history]
    assert (len(set(rates)) > 1) == (schedule != "constant")


def test_a_schedule_follows_the_steps_rewards_where_there_are_no_evaluations():
    options = {"patience": 0, "factor": 0.5, "threshold": 10.0, "threshold_mode": "abs"}
    config = replace(
        SETTINGS, evaluate_every=0, lr_schedule="reduce_lr_on_plateau", lr_schedule_options=options
    )  # fmt: skip
    run = trainer(config)
    rows = run.train()
    assert run.position.rewards == [row["reward"] for row in rows]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2, 1e-2, 5e-3, 2.5e-3])


def test_other_evaluations_than_those_of_the_checkpoint_are_refused(tmp_path: Path):
    trainer(replace(SETTINGS, steps=1), tmp_path).train()
    with pytest.raises(CheckpointError, match="evaluation_problems: 5 -> 6"):
        trainer(replace(SETTINGS, steps=1, evaluation_problems=6), tmp_path, resume=True)


def test_held_out_prompts_that_are_too_long_are_refused_before_the_first_step():
    @dataclass(frozen=True)
    class LongEval(Digits):
        def sample(self, split: str, index: int) -> Sample:
            return replace(super().sample(split, index), prompt="a=1;" * 10 if split == "eval" else "a=1;a?")

    run = trainer(replace(SETTINGS, max_prompt_tokens=20), task=LongEval())
    with pytest.raises(PolicyError, match=r"every problem must have at most 20 tokens .*, got 5 of 5 that are longer"):
        run.train()
    assert not run.history


def test_the_progress_line_keeps_the_last_evaluation(capsys: pytest.CaptureFixture):
    display = Display(total=2, finished=0, enabled=True)
    display.show({"step": 1, "reward": 0.25, "eval_reward": 0.5, "eval_best_reward": 0.75, "eval_best_step": 3})
    display.show({"step": 2, "reward": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert "eval 0.500 (best 0.750 at step 3)" in lines[0]
    assert "reward 0.500, eval 0.500 (best 0.750 at step 3)" in lines[1]


def test_the_command_line_evaluates_and_names_the_best(saved_model: Path, tmp_path: Path):
    run = tmp_path / "run"
    settings = ["--set", "evaluate_every=1", "--set", "evaluation_problems=3", "--credit", "uniform"]
    output = invoke(
        "train", "--model", saved_model, *SHORT, *SMALL, *settings, "--steps", 2, "--output", run, "--device", "cpu"
    ).output
    assert "best evaluation: reward" in output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all("eval_reward" in row for row in rows)
    found = invoke("eval", "--model", saved_model, *SHORT, "--adapter", run / "best", "-n", 3, "--json").stdout
    assert json.loads(found)["num_problems"] == 3
