"""Compare the memory that a request needs with the memory that is free, and refuse what would not fit."""

from __future__ import annotations

import psutil
import torch

from flowgraph.errors import MemoryLimitError

_USABLE_SHARE = 0.9
"""Share of the free memory that a request may take; other processes run beside it."""


def available_bytes(device: torch.device | str = "cpu") -> int:
    """Return the free memory of a device, in bytes.

    On a GPU, memory that PyTorch has reserved and does not use counts as free: a new tensor can have it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def require_memory(needed: float, what: str, remedy: str, device: torch.device | str = "cpu") -> None:
    """Refuse a request that would not fit.

    Args:
        needed: estimate in bytes.
        what: the request, for the message.
        remedy: what the caller can change, for the message.
        device: where the memory is needed.

    Raises:
        MemoryLimitError: ``needed`` bytes exceed nine tenths of the free memory of the device.
    """
    free = available_bytes(device)
    if needed > _USABLE_SHARE * free:
        raise MemoryLimitError(
            f"{what}: would need about {needed / 2**30:.1f} GiB, got {free / 2**30:.1f} GiB free on {device}; {remedy}"
        )
