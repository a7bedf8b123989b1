"""Token masks: read any way a user writes a region as one bool mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowgraph.errors import RegionError

Mask = Bool[Tensor, " tokens"]
Indices = Int[Tensor, " indices"] | Int[np.ndarray, " indices"]
Nothing = Float[Tensor, "0"]
"""What torch makes of an empty list."""
MaskLike = Mask | Bool[np.ndarray, " tokens"] | Indices | Nothing | Sequence[bool] | Sequence[int] | slice
"""A region of a text: a bool mask over tokens, token indices, or a slice of token indices."""


def as_mask(region: MaskLike, num_tokens: int, name: str, device: torch.device | str = "cpu") -> Mask:
    """Read a region given as mask, indices or slice as a bool mask over tokens.

    Raises:
        RegionError: wrong length or dtype, an index outside.
    """
    if isinstance(region, slice):
        mask = torch.zeros(num_tokens, dtype=torch.bool, device=device)
        mask[region] = True
        return mask
    values = torch.as_tensor(region, device=device)
    if values.ndim != 1:
        raise RegionError(
            f"{name}: must be one-dimensional, got shape {tuple(values.shape)}; pass one row per sequence"
        )
    if values.dtype == torch.bool:
        if values.numel() != num_tokens:
            raise RegionError(
                f"{name}: a mask must have one entry per token ({num_tokens}), got {values.numel()}; "
                "build it over the same input_ids as the rows, padding excluded"
            )
        return values.clone()
    if values.is_floating_point() and values.numel() > 0:  # torch reads an empty list as floats
        raise RegionError(f"{name}: must be a bool mask or integer indices, got {values.dtype}; convert with .bool()")
    outside = (values < 0) | (values >= num_tokens)
    if bool(outside.any()):
        raise RegionError(
            f"{name}: token indices must lie in 0..{num_tokens - 1}, got {int(values[outside][0])}; "
            "negative indices are not accepted, count from the start"
        )
    mask = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    mask[values.long()] = True
    return mask


def read_mask(region: MaskLike, num_tokens: int, name: str) -> Mask:
    """As :func:`as_mask` on the CPU, but an empty tensor or list selects nothing, whatever its dtype."""
    if isinstance(region, slice):
        return as_mask(region, num_tokens, name)
    values = torch.as_tensor(region)
    return as_mask(values if values.numel() else values.long(), num_tokens, name)


def between(question: Mask, answer: Mask) -> Mask:
    """Tokens after the last question token and before the first answer token."""
    position = torch.arange(question.numel(), device=question.device)
    if not bool(question.any()) or not bool(answer.any()):
        return torch.zeros_like(question)
    return (position > position[question].max()) & (position < position[answer].min())
