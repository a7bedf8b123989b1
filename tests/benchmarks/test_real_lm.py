"""The protocol for a real language model, at toy size, and its task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.gpu.real_lm.named_sums import NamedSums
from benchmarks.gpu.real_lm.protocol import arms_of, differences, main

from rl import CreditConfig, TaskError


def test_the_masks_of_a_worked_solution():
    task = NamedSums()
    sample = task.sample("train", 3)
    asked = sample.metadata["asked"]
    # The worked example of the prompt has the form of a right response.
    lines = [f"{name} = 1 + {place} = {place + 1}" for place, name in enumerate(sample.metadata["names"])]
    completion = "\n".join(lines) + f"\nAnswer: {sample.answer}"
    place = sample.metadata["names"].index(asked)
    assert [completion[start:end] for start, end in task.oracle(sample, completion)] == [str(place + 1)]
    others = [str(number + 1) for number in range(6) if number != place]
    assert [completion[start:end] for start, end in task.detours(sample, completion)] == others
    start, end = task.find_answer(completion) or (0, 0)
    assert completion[start:end] == sample.answer
    assert task.reward(sample, completion) == 1.0


@pytest.mark.parametrize("split", ["train", "eval"])
def test_problems_are_a_function_of_their_number(split: str):
    task = NamedSums(terms=3, seed=4)
    assert task.sample(split, 7) == task.sample(split, 7) != task.sample(split, 8)
    assert task.sample("train", 7) != task.sample("eval", 7)
    example, solution, problem = (message["content"] for message in task.sample(split, 7).prompt)
    assert example != problem
    # The reward of the worked example, as a response to its own problem.
    stated = solution.rsplit("Answer: ", 1)[1]
    name = example.rsplit(" ", 1)[1].rstrip(".")
    assert f"{name} = " in solution
    assert solution.split(f"{name} = ")[1].split("\n")[0].endswith(f"= {stated}")


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("Answer: {answer}", 1.0),
        ("The answer is **{answer}**", 1.0),
        ("<think>Answer: {answer}", 0.0),
        ("{answer}", 0.0),
        ("Answer: {answer}. No, Answer: -1", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_stated_answer_counts(completion: str, reward: float):
    task = NamedSums()
    sample = task.sample("train", 0)
    assert task.reward(sample, completion.format(answer=sample.answer)) == reward
    assert task.oracle(sample, completion) == task.detours(sample, completion) == []


def test_the_protocol_runs_at_toy_size(tmp_path: Path):
    out = tmp_path / "result.json"
    assert main(["--model", "program", "--task", "program", "--toy", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [run["arm"] for run in result["runs"]] == ["uniform", "recommended", "oracle"]
    plain, weighted, _ = result["runs"]
    assert weighted["learning_rate"] == plain["learning_rate"] / 2
    assert len(plain["reward"]) == 2
    # The same problems and the same noise: before the first update all arms have the same reward.
    assert plain["reward"][0] == weighted["reward"][0]
    assert result["arms"]["recommended"]["rule"] == "reach_sharp"
    assert result["auc"]["best"]["num_graphs"] == len(result["auc"]["graphs"])
    assert result["not_run"] == []


def test_runs_without_time_are_named(tmp_path: Path):
    out = tmp_path / "result.json"
    main(["--model", "program", "--task", "program", "--toy", "--out", str(out), "--budget", "0"])
    result = json.loads(out.read_text())
    assert result["runs"] == []
    assert result["not_run"] == [{"arm": arm, "seed": 0} for arm in ("uniform", "recommended", "oracle")]


def test_the_chosen_graph_becomes_the_recommended_arm():
    arms = arms_of("reach_sharp:options.power=8,options.layers=middle")
    assert arms["recommended"]["options"] == {"power": 8, "layers": "middle"}
    assert CreditConfig(**arms["recommended"]).floor == CreditConfig.recommended().floor
    assert arms_of(None)["recommended"]["options"] == CreditConfig.recommended().options


def test_differences_are_paired_by_seed():
    runs = [
        {"arm": "uniform", "seed": 0, "mean_reward": 0.25},
        {"arm": "oracle", "seed": 0, "mean_reward": 0.5},
        {"arm": "oracle", "seed": 1, "mean_reward": 0.75},
    ]
    assert differences(runs) == [{"arm": "oracle", "seed": 0, "minus_uniform": 0.25}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--model", "program", "--out", str(tmp_path / "r.json"), "--device", "cuda"]) == 2
    assert "--device: must be available, got 'cuda' without a GPU; pass --device cpu" in capsys.readouterr().err


def test_bad_input_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "r.json")
    assert main(["--model", "program", "--task", "sums of money", "--toy", "--out", out]) == 2
    assert "real_lm: task: must be" in capsys.readouterr().err
    assert main(["--model", "program", "--task", "program", "--toy", "--out", str(tmp_path / "no" / "r.json")]) == 2
    assert "real_lm: path: " in capsys.readouterr().err


def test_options_of_the_task_are_checked():
    with pytest.raises(TaskError, match="terms: must be an integer from 2 to 3, got 4; 2 is the default"):
        NamedSums(terms=4)
    with pytest.raises(TaskError, match="name: must be 'named_sums', got 'sums'"):
        NamedSums(name="sums")
