"""Every random draw is a function of the seed, its purpose and its place: there is no state that could be lost.

A run that was stopped, or that is split over other processes or micro-batches, draws the same numbers.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *place: str | int) -> int:
    """A seed of 63 bits for this purpose and place.

    Example:
        >>> derive(0, "sampling", 3, 17) == derive(0, "sampling", 3, 17) != derive(0, "sampling", 3, 18)
        True
    """
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *place: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for this purpose and place."""
    return torch.Generator(device).manual_seed(derive(seed, *place))
