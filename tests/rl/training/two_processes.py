"""What each process of ``test_processes`` runs: three short trainings, and one that goes on from inside a step."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from rl import CreditConfig, LoraConfig, PPOConfig, PPOTrainer
from tests.fixtures.policies import Digits, alphabet, tiny_policy

SETTINGS = PPOConfig(
    steps=3, num_prompts=4, group_size=3, max_response_tokens=8, num_minibatches=2, micro_batch_size=2,
    learning_rate=3e-3, lora=LoraConfig(rank=4), credit=CreditConfig(rule="flow", fallback=0.9), save_every_updates=1,
    keep_checkpoints=100, save_every=1,
)  # fmt: skip
EVALUATED = replace(
    SETTINGS, advantage="group", kl_coefficient=0.02, kl_target=0.05, evaluate_every=2, evaluation_problems=3,
)  # fmt: skip
RUNS = {"gae": replace(SETTINGS, gradient_checkpointing=True), "group": EVALUATED}
INSIDE = "checkpoint-000001-001"


def train(output: Path, config: PPOConfig, *, resume: bool = False) -> PPOTrainer:
    """A run whose adapters, critic and metrics are written beside its checkpoints."""
    run = PPOTrainer(
        tiny_policy(), alphabet(), task=Digits(), config=config, output=output, resume=resume, progress=False
    )
    run.train()
    if run.accelerator.is_main_process:
        weights = run.policy.policy_parameters() | run.policy.value_parameters()
        save_file({name: weight.detach().clone() for name, weight in weights.items()}, output / "weights.safetensors")
        (output / "history.json").write_text(json.dumps(run.history), encoding="utf-8")
    run.accelerator.wait_for_everyone()
    return run


def main(folder: Path) -> None:
    """Train, then cut the first run back to the middle of its second step and go on from there."""
    for name, config in RUNS.items():
        run = train(folder / name, config)
        if run.accelerator.is_main_process:
            print("processes", run.accelerator.num_processes, flush=True)
    whole, resumed = folder / "gae", folder / "resumed"
    if run.accelerator.is_main_process:
        (resumed / INSIDE).mkdir(parents=True)
        shutil.copytree(whole / INSIDE, resumed / INSIDE, dirs_exist_ok=True)
        shutil.copy(whole / "metrics.jsonl", resumed)
    run.accelerator.wait_for_everyone()
    train(resumed, RUNS["gae"], resume=True)
    if run.accelerator.num_processes > 1:
        import torch.distributed

        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
