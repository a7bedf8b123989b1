"""Random generators as functions of seed, purpose and position; there is no generator state to save.

A run that was stopped, or that is split over other processes or micro-batches, draws the same numbers.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *place: str | int) -> int:
    """Derive a seed of 63 bits from a seed, a purpose and a position.

    Args:
        seed: the seed of the run.
        place: the purpose and the position, such as ``"sampling", step, index``.

    Example:
        >>> derive(0, "sampling", 3, 17) == derive(0, "sampling", 3, 17)
        True
        >>> derive(0, "sampling", 3, 17) == derive(0, "sampling", 3, 18)
        False
    """
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    # torch takes seeds as signed 64-bit integers, so the sign bit stays 0.
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *place: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator from a seed, a purpose and a position, see :func:`derive`."""
    return torch.Generator(device).manual_seed(derive(seed, *place))
