"""The global generators of random, numpy and torch as a checkpoint holds them: tensors, and JSON for Python's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_tensors() -> dict[str, Tensor]:
    """Read the state of numpy's and torch's generators, those of all GPUs included."""
    # numpy's legacy state: ("MT19937", 624 keys, position, whether a second normal number is kept, that number).
    legacy: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, gauss = legacy
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(np.asarray(keys, dtype=np.int64)),
        "numpy_position": torch.tensor([int(position), int(has_gauss)]),
        "numpy_gauss": torch.tensor([float(gauss)], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = state
    return tensors


def python_random() -> list[Any]:
    """Read the state of Python's generator, whose integers JSON holds exactly."""
    version, internal, gauss = random.getstate()
    return [version, list(internal), gauss]


def restore_random(tensors: Mapping[str, Tensor], python: list[Any]) -> None:
    """Restore all generators; GPUs that the checkpoint's machine did not have keep their state.

    Args:
        tensors: of :func:`random_tensors`.
        python: of :func:`python_random`.
    """
    # Python's state is a tuple that holds a tuple; JSON has only lists.
    version, internal, gauss = python
    random.setstate((version, tuple(internal), gauss))

    torch.set_rng_state(tensors["torch"].cpu())

    # numpy's keys are unsigned 32-bit integers, which the checkpoint stores in 64 bits.
    keys = tensors["numpy"].numpy().astype(np.uint32)
    position, has_gauss = tensors["numpy_position"].tolist()
    numpy_gauss = float(tensors["numpy_gauss"])
    np.random.set_state(("MT19937", keys, position, has_gauss, numpy_gauss))

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            state = tensors.get(f"cuda.{index}")
            if state is not None:
                torch.cuda.set_rng_state(state.cpu(), index)
