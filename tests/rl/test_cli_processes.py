"""The command line outside the happy path of one process: as a module, in two processes at once, on a full disk."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flowgraph import OutputError
from rl.cli import app
from rl.training.checkpoint import read_state
from rl.training.tracking import read_metrics

ROOT = Path(__file__).parents[2]
SETTINGS = {"num_prompts": 2, "group_size": 2, "max_response_tokens": 6, "advantage": "rloo", "num_minibatches": 2,
            "save_every": 1, "save_every_updates": 1, "keep_checkpoints": 9, "steps": 1,
            "lora": {"rank": 2}}  # fmt: skip


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in an environment that no launcher has touched."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in launched}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False, cwd=cwd)


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: what the libraries below meet on a full disk, for any user to have."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def ordinary() -> int:
    """The mode of a file that nobody gave another one."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step by ``python -m rl.cli``."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    done = run("-m", "rl.cli", "train", "run.yaml", "--device", "cpu", "-o", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "metrics and checkpoints in out" in done.stdout, "the module did nothing"
    assert "share the work" not in done.stderr
    return folder


def test_no_file_of_a_run_is_private(trained: Path):
    found = modes(trained / "out")
    assert {"run.yaml", "metrics.jsonl", "adapter_model.safetensors", "optimizer.safetensors"} <= found.keys()
    assert set(found.values()) == {ordinary()}


def test_accelerate_starts_two_processes_as_the_page_says(trained: Path, tmp_path: Path):
    text = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("accelerate launch") and "--device cpu" in line]
    words = line.split("#")[0].split()
    assert words[:2] == ["accelerate", "launch"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(SETTINGS | {"output": "out"}))
    # Any free port: another run of these tests may have the usual one.
    done = run("-m", "accelerate.commands.launch", "--main_process_port", "0", *words[2:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes share the work" in done.stderr
    buffers = (tmp_path / "out" / "checkpoint-000000-001").glob("rollout-*")
    assert sorted(path.name for path in buffers) == ["rollout-0.safetensors", "rollout-1.safetensors"]
    one, two = (read_metrics(folder / "out" / "metrics.jsonl")[0] for folder in (trained, tmp_path))
    for name in ("reward", "entropy", "response_tokens"):
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_merge_writes_files_that_others_can_read(trained: Path, tmp_path: Path):
    done = CliRunner().invoke(app, ["merge", str(trained / "out"), "--out", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    found = modes(tmp_path / "new")
    assert {"model.safetensors", "tokenizer.json"} <= found.keys()
    assert set(found.values()) == {ordinary()}


def test_merge_on_a_full_disk_leaves_nothing(trained: Path, tmp_path: Path):
    with full_disk(100_000):
        done = CliRunner().invoke(app, ["merge", str(trained / "out"), "--out", str(tmp_path / "new")])
    assert isinstance(done.exception, OutputError)
    assert f"out: must be a new folder that can be written, got {tmp_path / 'new'}" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_on_a_full_disk_ends_with_its_message(trained: Path, tmp_path: Path):
    """Adapters fit, the optimiser's state does not."""
    first = trained / "out" / "checkpoint-000000-001"
    sizes = [(first / name).stat().st_size for name in ("policy/adapter_model.safetensors", "optimizer.safetensors")]
    assert sizes[0] < sizes[1]
    read_state(first)
    words = ["train", str(trained / "run.yaml"), "--device", "cpu", "-o", str(tmp_path / "out")]
    with full_disk(sum(sizes) // 2):
        done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, OutputError), done.output
    assert f"checkpoint checkpoint-000000-001 must fit into {tmp_path / 'out'}, got: File too large; make room" in str(
        done.exception
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.jsonl", "run.yaml"]
