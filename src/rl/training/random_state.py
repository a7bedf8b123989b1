"""The global generators of random, numpy and torch, as what a checkpoint holds: tensors, and JSON for Python's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_tensors() -> dict[str, Tensor]:
    """State of numpy's and torch's generators, those of all GPUs included."""
    kind: Any = np.random.get_state(legacy=True)
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(np.asarray(kind[1], dtype=np.int64)),
        "numpy_position": torch.tensor([int(kind[2]), int(kind[3])]),
        "numpy_gauss": torch.tensor([float(kind[4])], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def python_random() -> list[Any]:
    """State of Python's generator, whose integers JSON holds exactly."""
    version, internal, gauss = random.getstate()
    return [version, list(internal), gauss]


def restore_random(tensors: Mapping[str, Tensor], python: list[Any]) -> None:
    """Bring all of them back; GPUs that the checkpoint's machine did not have keep their state."""
    random.setstate((python[0], tuple(python[1]), python[2]))
    torch.set_rng_state(tensors["torch"].cpu())
    position, has_gauss = tensors["numpy_position"].tolist()
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(tensors["numpy_gauss"])))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{index}"].cpu(), index)
