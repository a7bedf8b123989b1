"""Estimate memory before taking it."""

from __future__ import annotations

import psutil
import torch

from flowgraph.errors import MemoryLimitError

_HEADROOM = 0.9  # other processes live here too


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Memory that a request on this device may still take.

    On a GPU the driver counts what PyTorch has reserved and does not use as taken; a new tensor can have it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def require_memory(needed: float, what: str, remedy: str, device: torch.device | str = "cpu") -> None:
    """Refuse a request that would not fit.

    Raises:
        MemoryLimitError: ``needed`` bytes exceed nine tenths of what the device has free.
    """
    free = available_bytes(device)
    if needed > _HEADROOM * free:
        raise MemoryLimitError(
            f"{what}: would need about {needed / 2**30:.1f} GiB, got {free / 2**30:.1f} GiB free on {device}; {remedy}"
        )
