"""What all sections share: the device, the sizes, the time that is left, and one large model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from benchmarks.gpu import models
from benchmarks.gpu.timing import release

Size = TypeVar("Size")


class DeviceLostError(RuntimeError):
    """The device no longer answers; a new process may get it back."""


@dataclass
class Context:
    """A run in progress.

    Attributes:
        device: where the work is done.
        toy: whether sizes are those of a test.
        seed: of every random number.
        began: reading of ``time.perf_counter`` at which the run began.
        section_ends: reading at which the present section must have ended.
    """

    device: torch.device
    toy: bool
    seed: int
    began: float
    section_ends: float = field(default=float("inf"))
    _model: Any = None

    def sized(self, full: Size, toy: Size) -> Size:
        """The value for the full sizes, or the one for a test."""
        return toy if self.toy else full

    def left(self) -> float:
        """Seconds that the present section has left."""
        return self.section_ends - time.perf_counter()

    def say(self, text: str) -> None:
        """Print a line with the time since the run began."""
        print(f"[{time.perf_counter() - self.began:7.1f} s] {text}", flush=True)

    def generator(self, number: int = 0) -> torch.Generator:
        """A generator on the CPU: the same numbers on every device."""
        return torch.Generator().manual_seed(1000 * self.seed + number)

    def model(self) -> Any:
        """The large model, built on first use and kept for the sections after it; without adapters."""
        if self._model is None:
            config = self.sized(models.qwen3_4b_config(), models.toy_config())
            start = time.perf_counter()
            self._model = models.random_model(config, self.device, models.LARGE_DTYPE, self.seed)
            self.say(f"built {models.described(self._model)} in {time.perf_counter() - start:.1f} s")
        return self._model

    def drop_model(self) -> None:
        """Forget the large model, so that its memory can be used again."""
        self._model = None
        release(self.device)

    def device_answers(self) -> bool:
        """Whether the device still computes: after some errors a process cannot use its GPU any more."""
        try:
            return float(torch.ones(2, device=self.device).sum()) == 2.0
        except RuntimeError:
            return False
