"""Two processes learn what one learns, and a run of two that stopped inside a step goes on as if it had not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from rl import ConfigError
from rl.training.distributed import check_accelerator, check_base
from tests.fixtures.policies import tiny_policy

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("two_processes.py")


def launch(folder: Path, processes: int) -> Path:
    """Run the script in so many processes that talk over the loopback; accelerate's own launcher needs MPI for that."""
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    command = [sys.executable, str(SCRIPT), str(folder)]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_addr", "127.0.0.1"]
        command[1:1] = [*launcher, "--master_port", str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # Gloo of torch 2.8 reports its connections in lines of their own.
    printed = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert " ".join(printed).split() == ["processes", str(processes)] * 2
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("one") / "runs", 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("two") / "runs", 2)


def history(folder: Path) -> list[dict[str, float]]:
    """Rows without what the clock says."""
    rows = json.loads((folder / "history.json").read_text())
    clock = ("seconds", "percent", "per_second")
    return [{name: value for name, value in row.items() if not name.endswith(clock)} for row in rows]


@pytest.mark.parametrize("name", ["gae", "group", "resumed"])
def test_two_processes_learn_what_one_learns(one: Path, two: Path, name: str):
    """Up to rounding: batches of other widths are summed in another order."""
    alone, shared = (load_file(folder / name / "weights.safetensors") for folder in (one, two))
    assert alone.keys() == shared.keys()
    assert any(weight.abs().max() > 1e-3 for key, weight in alone.items() if "lora_B" in key)
    for key, weight in alone.items():
        # Adam divides by the gradient's own size, so a weight with hardly any gradient moves with its rounding.
        assert float((weight - shared[key]).abs().max()) < 1e-5, key
    rows = history(one / name)
    assert len(rows) == 3
    for row, other in zip(rows, history(two / name), strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6), row["step"]


def test_two_processes_go_on_inside_a_step(two: Path):
    """The weights to the bit, and the log of the step that was cut: each process had logged its own sequences."""
    whole, resumed = (load_file(two / name / "weights.safetensors") for name in ("gae", "resumed"))
    for key, weight in whole.items():
        assert weight.equal(resumed[key]), key
    for row, other in zip(history(two / "gae"), history(two / "resumed"), strict=True):
        assert row == pytest.approx(other, rel=1e-9), row["step"]


def test_the_two_processes_had_different_sequences(two: Path):
    """Otherwise the equalities above would say nothing."""
    buffers = [load_file(two / "gae" / "checkpoint-000001-001" / f"rollout-{rank}.safetensors") for rank in (0, 1)]
    names = [name for name in buffers[0] if name.endswith("input_ids")]
    assert names
    for name in names:
        assert buffers[0][name].shape != buffers[1][name].shape or not buffers[0][name].equal(buffers[1][name])


@pytest.mark.parametrize(
    ("set_up", "message"),
    [
        ({"num_processes": 3}, "num_prompts: must be a multiple of the 3 processes, got 4"),
        ({"gradient_accumulation_steps": 2}, "accelerator: must have gradient_accumulation_steps=1, got 2"),
        (
            {"distributed_type": SimpleNamespace(name="FSDP")},
            r"must give each process the entire base, got FSDP, which shards it; generation and scoring need all of "
            r"it, so train with TRL under FSDP2 or ZeRO-3 \(rl.integrations.trl.flow_grpo_trainer\), or launch with",
        ),
        ({"distributed_type": SimpleNamespace(name="DEEPSPEED")}, "got DEEPSPEED, .*TRL under FSDP2 or ZeRO-3"),
        ({"mixed_precision": "fp16"}, "accelerator: must have mixed_precision 'no' or 'bf16', got 'fp16'"),
    ],
)
def test_a_launch_that_would_change_the_gradient_is_refused(set_up: dict, message: str):
    plain: dict = {"distributed_type": SimpleNamespace(name="MULTI_CPU"), "num_processes": 2}
    plain |= {"gradient_accumulation_steps": 1, "mixed_precision": "bf16"}
    check_accelerator(SimpleNamespace(**plain), 4)
    with pytest.raises(ConfigError, match=message):
        check_accelerator(SimpleNamespace(**plain | set_up), 4)


@pytest.mark.parametrize(
    ("mark", "found"),
    [("ds_id", "weights of DeepSpeed ZeRO-3"), ("full_tensor", r"weights of the type DTensor \(FSDP2")],
)
def test_a_base_that_is_sharded_already_is_refused_with_a_trainer_that_takes_it(mark: str, found: str):
    model = tiny_policy()
    check_base(model)
    setattr(model.model.norm.weight, mark, 0)
    with pytest.raises(ConfigError, match=rf"model: must give each process the entire base, got {found}.*flow_grpo"):
        check_base(model)
