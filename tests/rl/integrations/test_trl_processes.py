"""TRL's trainer with credit where two processes share the weights: FSDP2 by accelerate, and DeepSpeed ZeRO-3."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

REASON = "TRL is an optional package: pip install trl"
pytest.importorskip("trl.trainer.grpo_trainer", reason=REASON)
pytest.importorskip("datasets", reason=REASON)

from rl.config import CreditConfig  # noqa: E402  (after the packages that these tests need)
from tests.fixtures.policies import tiny_policy  # noqa: E402
from tests.rl.integrations import test_trl as one  # noqa: E402
from tests.rl.integrations import two_trl_processes  # noqa: E402

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("two_trl_processes.py")
PROCESSES = 2
STRONG = CreditConfig(rule="flow_sharp", shape="soft", floor=0.5, ceiling=2, fallback=0.9)


def launch(folder: Path, kind: str) -> Path:
    """Run the script in two processes that talk over the loopback, as torchrun starts them."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launched}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo", "FLOWGRAPH_CHECK_SHAPES": "0",
    }  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(PROCESSES), "--master_addr", "127.0.0.1"]
    command = [sys.executable, *launcher, "--master_port", str(port), str(SCRIPT), str(folder), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folder


@pytest.fixture(scope="module", params=["fsdp2", "zero3"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one launch; ZeRO-3 needs DeepSpeed, which the development packages leave out."""
    if request.param == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install deepspeed")
    return launch(tmp_path_factory.mktemp(request.param), request.param)


def learned(folder: Path, name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def test_weights_of_one_leave_the_sharded_run_as_it_is_to_the_last_bit(run: Path):
    losses, weights = learned(run, "stock")
    our_losses, our_weights = learned(run, "even")
    assert any(losses)
    assert our_losses == losses
    for name, weight in weights.items():
        assert torch.equal(our_weights[name], weight), name
    _, credited = learned(run, "lora")
    assert not all(torch.equal(credited[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_credit_of_two_processes_is_that_of_one(run: Path, peft: bool, tmp_path: Path):
    """At every rollout, with the weights of that step, and with the fallback, which compares all sequences."""
    name = "lora" if peft else "full"
    of_processes = [torch.load(run / f"{name}-{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    trainer = one.make(tmp_path, STRONG, peft=peft, per_device_train_batch_size=8, num_generations=4)
    assert len(of_processes[0]) == (2 if peft else 1)
    for step, parts in enumerate(zip(*of_processes, strict=True)):
        assert [part["step"] for part in parts] == [step, step]
        missing = trainer.model.load_state_dict(parts[0]["weights"], strict=False)
        assert not missing.unexpected_keys
        trainer.state.global_step = step
        trainer._rewards = torch.cat([part["rewards"] for part in parts])
        inputs = [example for part in parts for example in part["inputs"]]
        credit = trainer._token_credit(inputs, joined(trainer, [part["output"] for part in parts]))

        unanchored = torch.cat([part["credit"]["unanchored"] for part in parts])
        assert torch.equal(credit.unanchored, unanchored)
        first = 0
        for part in parts:
            found = part["credit"]
            count, width = found["weights"].shape
            rows = slice(first, first + count)
            torch.testing.assert_close(credit.weights[rows, :width], found["weights"], rtol=0, atol=1e-5)
            torch.testing.assert_close(credit.scores[rows, :width], found["scores"], rtol=0, atol=1e-5)
            first += count
        assert bool((credit.weights != 1).any())


def joined(trainer: Any, outputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join the rollouts of the processes, which are padded to the widths of each."""
    whole = {}
    sides = {"prompt_ids": "left", "prompt_mask": "left", "completion_ids": "right", "completion_mask": "right"}
    for name, side in sides.items():
        width = max(output[name].shape[1] for output in outputs)
        value = trainer.processing_class.pad_token_id if name.endswith("ids") else 0
        parts = []
        for output in outputs:
            missing = width - output[name].shape[1]
            padding = (missing, 0) if side == "left" else (0, missing)
            parts.append(torch.nn.functional.pad(output[name], padding, value=value))
        whole[name] = torch.cat(parts)
    return whole


def test_trl_resumes_a_sharded_run_with_credit(run: Path):
    """From a checkpoint after the first of two steps, to the bit: rollouts, credit and optimizer go on."""
    losses, weights = learned(run, "lora")
    resumed_losses, resumed = learned(run, "resumed")
    assert resumed_losses == losses
    for name, weight in weights.items():
        assert torch.equal(resumed[name], weight), name


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("rule", "credit.rule: must be the same in all processes, got 'flow' in process 0 and 'entropy' in process 1"),
        (
            "option",
            "credit.options: must be the same in all processes, got {'power': 2.0} in process 0 and {'power': 3.0} in "
            "process 1; start every process with the same script, settings and data",
        ),
        ("unknown", "credit.rule: must be the same in all processes, got 'flow' in process 0 and 'none' in process 1"),
        (
            "length",
            "args.max_completion_length: must be the same in all processes, got 10 in process 0 and 11 in process 1",
        ),
        (
            "sequences",
            "inputs (number of sequences): must be the same in all processes, got 4 in process 0 and 2 in process 1",
        ),
    ],
)
def test_processes_that_disagree_are_refused_in_each_of_them(run: Path, case: str, message: str):
    for rank in range(PROCESSES):
        found = json.loads((run / f"messages-{rank}.json").read_text())
        assert found[case].startswith(message)


def test_rows_of_a_model_in_parts_are_those_of_the_complete_model(run: Path):
    """Where every attention module and every output projection is released as soon as it ran."""
    if not (run / "rows-0.pt").exists():
        pytest.skip("the parts are those of fully_shard")
    model = tiny_policy("qwen3")
    for rank in range(PROCESSES):
        rows = torch.load(run / f"rows-{rank}.pt", weights_only=True)
        assert set(rows) == set(two_trl_processes.CAPACITIES)
        for capacity, found in rows.items():
            expected = two_trl_processes.one_capture(model, capacity)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        refusal = json.loads((run / f"messages-{rank}.json").read_text())["gradient"]
        assert refusal.startswith(
            "capacity: must need no backward pass where processes share the weights (FSDP2, ZeRO-3), got 'gradient'; "
        )


def test_an_error_of_one_process_ends_all(run: Path):
    of_other, own = (json.loads((run / f"messages-{rank}.json").read_text())["answer"] for rank in range(PROCESSES))
    assert "ValueError: no digit" in own
    assert of_other.startswith("process 1: must give credit to its sequences, got an error: ")
    assert own in of_other
