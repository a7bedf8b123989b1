"""Global generators come back where they were, also between the two halves of a pair of normal numbers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rl.training.random_state import python_random, random_tensors, restore_random


def drawn() -> list[float]:
    return [
        random.gauss(0, 1), random.random(), float(np.random.normal()), float(np.random.rand()),
        float(np.random.normal()), float(torch.randn(())),
    ]  # fmt: skip


def test_they_go_on_through_files_as_if_nothing_had_been(tmp_path: Path):
    random.gauss(0, 1)
    np.random.normal()  # draws two and keeps one, as random.gauss does
    save_file(random_tensors(), tmp_path / "random.safetensors")
    kept = json.dumps(python_random())
    expected = drawn()
    assert drawn() != expected
    restore_random(load_file(tmp_path / "random.safetensors"), json.loads(kept))
    assert drawn() == expected
