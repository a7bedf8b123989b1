"""A signal ends the run after the running step, with a checkpoint; a resume without one loses no metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rl import CreditConfig, LoraConfig, PPOConfig, PPOTrainer, RewardError
from rl.training import interruption
from rl.training.checkpoint import find_checkpoints, read_state
from rl.training.interruption import StopRequest
from rl.training.tracking import read_metrics
from tests.fixtures.policies import Digits, alphabet, tiny_policy
from tests.fixtures.rl_commands import SMALL

ROOT = Path(__file__).parents[3]
SETTINGS = PPOConfig(
    steps=4, num_prompts=2, group_size=2, max_response_tokens=8, advantage="group", save_every=0,
    lora=LoraConfig(rank=2), credit=CreditConfig(rule="uniform"),
)  # fmt: skip
ONE_PROCESS = SimpleNamespace(num_processes=1)


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Handle SIGINT as a terminal's process does: a command in the background starts with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Signalling(Digits):
    """The first response of the second step brings a signal."""

    def __init__(self, number: int, times: int = 1) -> None:
        super().__init__()
        object.__setattr__(self, "number", number)
        object.__setattr__(self, "times", times)

    def __repr__(self) -> str:
        return repr(Digits())

    def reward(self, sample, completion):
        if sample.index == 2 and self.times:
            object.__setattr__(self, "times", self.times - 1)
            signal.raise_signal(self.number)
        return super().reward(sample, completion)


def trainer(output: Path | None, task: Digits, **options) -> PPOTrainer:
    options = {"config": SETTINGS, "progress": False} | options
    return PPOTrainer(tiny_policy(), alphabet(), task=task, output=output, **options)


def weights(run: PPOTrainer) -> list[torch.Tensor]:
    return list(run.policy.policy_parameters().values())


def test_ctrl_c_ends_the_step_with_a_checkpoint_and_the_run_goes_on_from_it(tmp_path: Path):
    stopped = trainer(tmp_path, Signalling(signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-000002"]
    read_state(tmp_path / "checkpoint-000002")
    resumed = trainer(tmp_path, Digits(), resume=True)
    assert resumed.position.step == 2
    assert len(resumed.train()) == 4
    never = trainer(None, Digits())
    never.train()
    assert all(torch.equal(one, other) for one, other in zip(weights(resumed), weights(never), strict=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_reach_the_handler_that_stood_before(tmp_path: Path, number: int):
    received = []
    before = signal.signal(number, lambda signum, frame: received.append(signum))
    try:
        history = trainer(tmp_path, Signalling(number)).train()
    finally:
        signal.signal(number, before)
    assert received == [number]
    assert len(history) == 2
    assert (tmp_path / "checkpoint-000002" / "state.json").exists()


def test_a_checkpoint_that_is_due_anyway_is_written_once(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, Signalling(signal.SIGINT), config=replace(SETTINGS, save_every=1)).train()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-000002", "checkpoint-000001"]


def test_two_signals_at_once_are_one_request_and_a_later_one_acts_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "one", Signalling(signal.SIGINT, times=2)).train()
    assert (tmp_path / "one" / "checkpoint-000002").exists()
    monkeypatch.setattr(interruption, "_SAME_REQUEST_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "two", Signalling(signal.SIGINT, times=2)).train()
    assert find_checkpoints(tmp_path / "two") == []


def test_a_reward_that_fails_leaves_the_finished_steps(tmp_path: Path):
    class Failing(Digits):
        __repr__ = Signalling.__repr__

        def reward(self, sample, completion):
            if sample.index == 5:
                raise ConnectionError("the judge is away")
            return super().reward(sample, completion)

    with pytest.raises(RewardError, match="ConnectionError: the judge is away"):
        trainer(tmp_path, Failing()).train()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-000002"]
    resumed = trainer(tmp_path, Digits(), resume=True)
    resumed.train()
    never = trainer(None, Digits())
    never.train()
    assert all(torch.equal(one, other) for one, other in zip(weights(resumed), weights(never), strict=True))


def test_without_a_folder_a_signal_acts_at_once():
    run = trainer(None, Signalling(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.position.step == 1


def test_ignored_signals_stay_ignored_and_other_threads_handle_none():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(enabled=True, notify=lambda name: None) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.agreed(ONE_PROCESS)
    finally:
        signal.signal(signal.SIGHUP, before)
    handler = signal.getsignal(signal.SIGINT)

    def elsewhere() -> None:
        with StopRequest(enabled=True, notify=lambda name: None):
            assert signal.getsignal(signal.SIGINT) is handler

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", -signal.SIGTERM)])
def test_the_command_line_says_where_it_stopped(tmp_path: Path, saved_model: Path, number: str, code: int):
    (tmp_path / "score.py").write_text(
        "import os, signal\n"
        "def score(samples, completions):\n"
        "    if samples[0].index >= 2:\n"
        f"        os.kill(os.getpid(), signal.{number})\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    lines = [json.dumps({"prompt": f"a={number};a?", "answer": "1"}) for number in range(9)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    words = ["train", "--model", saved_model, "--task", "p.jsonl", "--task-option", "reward=score.py:score"]
    words += ["--steps", 9, "--output", "run", "--device", "cpu", *SMALL, "--set", "num_prompts=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rl.cli", *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=environment, check=False, cwd=tmp_path
    )
    assert done.returncode == code, done.stderr
    assert f"{number}: the running step ends with a checkpoint" in done.stderr
    assert "stopped after step 2 with a complete checkpoint-000002" in done.stderr
    assert (tmp_path / "run" / "checkpoint-000002" / "state.json").exists()
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2


# Resume without a checkpoint -------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, False])
def test_a_new_start_in_a_folder_with_metrics_keeps_them(
    tmp_path: Path, resume: bool, capsys: pytest.CaptureFixture[str]
):
    rows = "".join(json.dumps({"step": step, "reward": 0.5}) + "\n" for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(rows)
    (tmp_path / "metrics-001.jsonl").write_text("older\n")
    run = trainer(tmp_path, Digits(), resume=resume, progress=True, config=replace(SETTINGS, steps=1))
    said = capsys.readouterr().err
    assert "the rows of the earlier run are kept in" in said
    assert "metrics-002.jsonl" in said
    assert (f"resume: no checkpoint in {tmp_path}, so the run starts at its first step" in said) is resume
    run.train()
    assert (tmp_path / "metrics-002.jsonl").read_text() == rows
    assert (tmp_path / "metrics-001.jsonl").read_text() == "older\n"
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_a_resume_in_an_empty_folder_says_that_it_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer(tmp_path / "new", Digits(), resume=True)
    assert "new, so the run starts at its first step" in caplog.text
    assert "earlier run" not in caplog.text


def test_a_plain_resume_makes_its_rows_again_and_changed_settings_set_them_aside(tmp_path: Path):
    trainer(tmp_path, Digits(), config=replace(SETTINGS, steps=2, save_every=1)).train()
    extra = json.dumps({"step": 3, "reward": 0.25}) + "\n"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(extra)
    before = (tmp_path / "metrics.jsonl").read_text()
    trainer(tmp_path, Digits(), resume=True, config=replace(SETTINGS, save_every=1))
    assert not (tmp_path / "metrics-001.jsonl").exists()
    (tmp_path / "metrics.jsonl").write_text(before)
    changed = replace(SETTINGS, save_every=1, learning_rate=1e-3)
    trainer(tmp_path, Digits(), resume=True, allow_changes=True, config=changed)
    assert (tmp_path / "metrics-001.jsonl").read_text() == before
