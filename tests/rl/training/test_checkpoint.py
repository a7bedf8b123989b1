"""Killed anywhere and resumed is never stopped; a half-written checkpoint is never loaded; adapters are plain PEFT."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor

import rl.training.checkpoint
from flowgraph import OutputError
from rl import CheckpointError, CreditConfig, LoraConfig, PPOConfig, PPOTrainer
from rl.training.checkpoint import find_checkpoints, newest_state, read_state
from rl.training.tracking import read_metrics
from tests.fixtures.policies import Digits, alphabet, tiny_policy

SETTINGS = PPOConfig(
    steps=4, num_prompts=3, group_size=2, max_response_tokens=8, num_minibatches=3, epochs=2, learning_rate=3e-3,
    warmup_steps=2, lora=LoraConfig(rank=4), kl_target=0.05, credit=CreditConfig(rule="flow"), save_every=1,
    save_every_updates=1, keep_checkpoints=100,
)  # fmt: skip


class Drawing(Digits):
    """Rewards that draw from the global generators, as a user's function may."""

    def reward(self, sample, completion):
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return super().reward(sample, completion) + noise


def trainer(output: Path | None, config: PPOConfig = SETTINGS, task: object = None, **options) -> PPOTrainer:
    return PPOTrainer(
        tiny_policy(),
        alphabet(),
        task=task or Drawing(),
        config=config,
        output=output,
        progress=False,
        **options,
    )


def seed_all() -> None:
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)


def weights(run: PPOTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in (run.policy.policy_parameters() | run.policy.value_parameters()).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run that was never stopped, with a checkpoint of every update."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder)
    seed_all()
    run.train()
    return folder, weights(run)


def test_every_update_leaves_a_checkpoint(whole):
    folder, _ = whole
    names = [path.name for path in find_checkpoints(folder)]
    places = [*((step, update) for step in range(4) for update in range(6) if step or update), (4, 0)]
    expected = [f"checkpoint-{step:06d}" + (f"-{update:03d}" if update else "") for step, update in places]
    assert names == expected[::-1]


@pytest.mark.parametrize("name", ["000001", "000003", "000000-001", "000002-003", "000003-005"])
def test_resumed_anywhere_is_never_stopped(whole, tmp_path: Path, name: str):
    """At the end of a step, and inside the rollout buffer: difference 0.0 in every weight, metric and beta."""
    folder, expected = whole
    shutil.copytree(folder / f"checkpoint-{name}", tmp_path / f"checkpoint-{name}")
    shutil.copy(folder / "metrics.jsonl", tmp_path)  # holds later steps too, as after a kill
    random.seed(0)
    torch.manual_seed(0)
    run = trainer(tmp_path, resume=True)
    run.train()
    assert same(weights(run), expected)
    timing = {"seconds", "tokens_per_second", "credit_overhead_percent"}

    def figures(path: Path) -> list[dict]:
        rows = read_metrics(path / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k not in timing and not k.endswith("_seconds")} for row in rows]

    assert figures(tmp_path) == figures(folder)


def test_killed_at_any_moment_and_resumed_is_never_stopped(tmp_path: Path):
    """SIGKILL at chosen changes of a file, twice; then the run goes through."""
    # a checkpoint is about 19 changes, and the run writes 36 of them
    script = (
        "import sys, torch; from pathlib import Path; from dataclasses import replace\n"
        "from tests.rl.training.test_checkpoint import *\n"
        "from tests.fixtures.kills import kill_at_change\n"
        "kill_at_change(Path(sys.argv[1]), int(sys.argv[2]))\n"
        "run = trainer(Path(sys.argv[1]), replace(SETTINGS, steps=6), resume=True, task=Digits())\n"
        "run.train()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for kill_at in (150, 271, 0):
        command = [sys.executable, "-c", script, str(tmp_path), str(kill_at)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == (-signal.SIGKILL if kill_at else 0), done.stderr
    resumed = trainer(tmp_path, replace(SETTINGS, steps=6), resume=True, task=Digits())
    never = trainer(None, replace(SETTINGS, steps=6), task=Digits())
    never.train()
    assert same(weights(resumed), weights(never))


def test_a_half_written_or_damaged_checkpoint_is_passed_over(whole, tmp_path: Path):
    folder, _ = whole
    for name in ("checkpoint-000001", "checkpoint-000002", "checkpoint-000003"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "checkpoint-000003" / "state.json").unlink()
    damaged = tmp_path / "checkpoint-000002" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))
    (tmp_path / ".writing-checkpoint-000004").mkdir()
    found = newest_state(tmp_path)
    assert found is not None
    assert found[0].name == "checkpoint-000001"
    with pytest.raises(CheckpointError, match=r"got a changed or missing optimizer.safetensors"):
        read_state(tmp_path / "checkpoint-000002")
    with pytest.raises(CheckpointError, match=r"must be a complete folder of this package"):
        read_state(tmp_path / "checkpoint-000003")


def test_another_format_or_version_is_refused(whole, tmp_path: Path):
    folder, _ = whole
    target = tmp_path / "checkpoint-000001"
    shutil.copytree(folder / "checkpoint-000001", target)
    state = json.loads((target / "state.json").read_text())
    (target / "state.json").write_text(json.dumps(state | {"version": 99}))
    with pytest.raises(CheckpointError, match=r"must have format flowgraph-rl-checkpoint version 1, got .* version 99"):
        read_state(target)


def test_other_settings_are_listed_and_can_be_allowed(whole, tmp_path: Path):
    folder, _ = whole
    shutil.copytree(folder / "checkpoint-000001", tmp_path / "checkpoint-000001")
    other = replace(SETTINGS, clip=0.3, credit=replace(SETTINGS.credit, strength=2.0))
    with pytest.raises(CheckpointError, match=r"config.clip: 0.2 -> 0.3; config.credit.strength: 1.5 -> 2.0; set them"):
        trainer(tmp_path, other, resume=True)
    assert trainer(tmp_path, other, resume=True, allow_changes=True).position.step == 1
    assert trainer(tmp_path, replace(SETTINGS, save_every=7, steps=9), resume=True).position.step == 1


def test_an_adapter_of_another_shape_is_refused(whole, tmp_path: Path):
    folder, _ = whole
    shutil.copytree(folder / "checkpoint-000001", tmp_path / "checkpoint-000001")
    with pytest.raises(CheckpointError, match="adapter: must fit the model's LoRA layers"):
        trainer(tmp_path, replace(SETTINGS, lora=LoraConfig(rank=2)), resume=True, allow_changes=True)


def test_a_full_disk_leaves_the_checkpoints_before_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = trainer(tmp_path, replace(SETTINGS, save_every_updates=None))
    real, calls = rl.training.checkpoint._save_tensors, []

    def full(path: Path, tensors: dict[str, Tensor]) -> None:
        calls.append(path)
        if len(calls) > 8:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(rl.training.checkpoint, "_save_tensors", full)
    with pytest.raises(OutputError, match=r"checkpoint-00000\d must fit into .*: No space left on device; make room"):
        run.train()
    left = find_checkpoints(tmp_path)
    assert left
    for path in left:
        read_state(path)
    assert not list(tmp_path.glob(".writing-*"))


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path):
    trainer(tmp_path, replace(SETTINGS, save_every_updates=None, keep_checkpoints=2)).train()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-000004", "checkpoint-000003"]


def test_the_adapter_loads_in_plain_peft_with_the_same_logits(whole):
    folder, _ = whole
    ids = torch.tensor([[3, 30, 39, 5, 8, 12]])
    run = trainer(folder, resume=True)
    plain = PeftModel.from_pretrained(tiny_policy(), str(folder / "checkpoint-000004" / "policy"))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, run.policy.causal_lm(ids).logits, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(plain.merge_and_unload()(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_value_head_reloads(whole):
    folder, expected = whole
    run = trainer(folder, resume=True)
    assert run.policy.value_head is not None
    assert torch.equal(run.policy.value_head.weight, expected["value_head.weight"])
    assert run.policy.value_head.weight.abs().max() > 0


def test_nothing_in_a_checkpoint_is_pickled(whole):
    folder, _ = whole
    kinds = {path.suffix for path in (folder / "checkpoint-000002-003").rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}


def test_a_finished_run_has_nothing_to_do_but_keeps_its_history(tmp_path: Path):
    trainer(tmp_path, replace(SETTINGS, save_every_updates=None)).train()
    run = trainer(tmp_path, replace(SETTINGS, save_every_updates=None), resume=True)
    before = weights(run)
    assert [row["step"] for row in run.train()] == [1, 2, 3, 4]
    assert same(before, weights(run))


def test_a_run_without_a_whole_checkpoint_is_not_started_anew(whole, tmp_path: Path):
    folder, _ = whole
    for name in ("checkpoint-000001", "checkpoint-000002"):
        shutil.copytree(folder / name, tmp_path / name)
        (tmp_path / name / "state.json").write_text("{")
    shutil.copy(folder / "metrics.jsonl", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"resume: .* must hold a complete checkpoint, got damaged ones, .*000002"
    ):
        trainer(tmp_path, resume=True)
    assert read_metrics(tmp_path / "metrics.jsonl")
    assert newest_state(tmp_path / "empty") is None


def test_an_optimiser_of_other_weights_is_refused(whole, tmp_path: Path):
    folder, _ = whole
    shutil.copytree(folder / "checkpoint-000001", tmp_path / "checkpoint-000001")
    with pytest.raises(CheckpointError, match=r"resume: the optimiser must have stepped on the weights .*value"):
        trainer(tmp_path, replace(SETTINGS, advantage="group", kl_target=None), resume=True, allow_changes=True)


def test_a_rollout_buffer_of_another_size_is_refused(whole, tmp_path: Path):
    folder, _ = whole
    shutil.copytree(folder / "checkpoint-000002-003", tmp_path / "checkpoint-000002-003")
    with pytest.raises(CheckpointError, match=r"num_prompts \* group_size must stay .* 12 responses .* holds 6"):
        trainer(tmp_path, replace(SETTINGS, group_size=4), resume=True, allow_changes=True)


def test_a_run_keeps_its_reference(tmp_path: Path):
    """Without its first adapter the KL would be one to the base, and nothing would say so."""
    config = replace(SETTINGS, steps=1, save_every_updates=None)

    def adapted(seed: int) -> PeftModel:
        lora = PeftLoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model, draws = get_peft_model(tiny_policy(), lora), torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.1, generator=draws)
        return model

    def run(model, **options) -> PPOTrainer:
        return PPOTrainer(model, alphabet(), task=Digits(), config=config, output=tmp_path, progress=False, **options)

    run(adapted(1)).train()
    assert run(adapted(1), resume=True).position.step == 1
    with pytest.raises(CheckpointError, match=r"reference: 'adapter [0-9a-f]{16}' -> 'base'"):
        run(tiny_policy(), resume=True)
    with pytest.raises(CheckpointError, match=r"reference: 'adapter [0-9a-f]{16}' -> 'adapter"):
        run(adapted(2), resume=True)


def test_a_run_on_a_file_is_resumed_and_a_changed_file_is_refused(tmp_path: Path):
    problems = tmp_path / "sums.jsonl"
    lines = [json.dumps({"prompt": f"a={number};a?", "answer": str(number)}) for number in range(10)]
    config, output = replace(SETTINGS, steps=1, save_every_updates=None), tmp_path / "run"

    def run(**options) -> PPOTrainer:
        return PPOTrainer(tiny_policy(), alphabet(), task=str(problems), config=config, output=output,
                          progress=False, **options)  # fmt: skip

    problems.write_text("\n".join(lines))
    run().train()
    assert run(resume=True).position.step == 1
    problems.write_text("\n".join(lines).replace('"7"', '"8"'))
    with pytest.raises(CheckpointError, match='task: "JsonlTask'):
        run(resume=True)


class Nameless(Digits):
    """A task whose text says no more than where it lies."""

    __repr__ = object.__repr__


def test_where_a_task_lies_in_memory_does_not_matter(tmp_path: Path):
    config = replace(SETTINGS, steps=1, save_every_updates=None)
    first, second = Nameless(), Nameless()
    assert repr(first) != repr(second)
    trainer(tmp_path, config, first).train()
    assert trainer(tmp_path, config, second, resume=True).position.step == 1
