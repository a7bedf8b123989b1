"""The few names below the packages' public roots that these measurements need, all in this one place.

Each is looked up when it is used, among the modules that are loaded, so that a module that is renamed or moved does
no harm; a name that no longer exists raises :class:`LookupError`, and the part that needs it is recorded as failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

import flowgraph
import rl

SCRATCH_BYTES = "_SCRATCH_BYTES"
"""Size of the softmax weights that recomputed attention rows hold at once."""
SPARSE_BLOCK = "SPARSE_BLOCK"
"""Tokens per block of the sweeps over edges."""


@contextmanager
def setting(name: str, value: int) -> Iterator[None]:
    """Give a module constant of flowgraph another value inside the block.

    Raises:
        LookupError: no loaded module of flowgraph has such a constant.
    """
    _ = flowgraph.AttentionRows, flowgraph.solve_rows, flowgraph.solve  # names load on first use
    modules = _modules_with("flowgraph", name)
    before = [getattr(module, name) for module in modules]
    try:
        for module in modules:
            setattr(module, name, value)
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            setattr(module, name, old)


def value_of(name: str) -> int:
    """The present value of a module constant of flowgraph.

    Raises:
        LookupError: no loaded module of flowgraph has such a constant.
    """
    _ = flowgraph.AttentionRows, flowgraph.solve_rows, flowgraph.solve
    return getattr(_modules_with("flowgraph", name)[0], name)


def sampling_noise(seeds: Sequence[int], temperature: float) -> Callable[[Any, torch.Tensor], Any]:
    """The sampler's own logits processor, which adds Gumbel noise to ``[sequences, vocabulary]`` logits.

    Raises:
        LookupError: no loaded module of rl has it.
    """
    _ = rl.PPOTrainer  # loads the module of the sampler
    (module, *_) = _modules_with("rl", "GumbelNoise")
    return module.GumbelNoise(seeds, temperature, 0)


def _modules_with(package: str, name: str) -> list[ModuleType]:
    found = [
        module
        for path, module in list(sys.modules.items())
        if (path == package or path.startswith(f"{package}.")) and name in vars(module)
    ]
    if not found:
        raise LookupError(
            f"{name}: must be defined in a module of {package}, got none that is loaded; look for its new name there "
            "and change benchmarks/gpu/internals.py"
        )
    return found
