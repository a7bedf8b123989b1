"""Token masks: read a region given as a mask, indices or a slice as one bool mask over tokens."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowgraph.errors import InvalidInputError, RegionError, first_line

Mask = Bool[Tensor, " tokens"]
Indices = Int[Tensor, " indices"] | Int[np.ndarray, " indices"]
Nothing = Float[Tensor, "0"]
"""What torch makes of an empty list."""
MaskLike = Mask | Bool[np.ndarray, " tokens"] | Indices | Nothing | Sequence[bool] | Sequence[int] | Set[int] | slice
"""A region of a text: a bool mask over tokens, token indices, or a slice of token indices."""


def as_tensor(
    values: Any,
    name: str,
    remedy: str,
    *,
    device: torch.device | str | None = None,
    error: type[InvalidInputError] = InvalidInputError,
    is_precise: bool = False,
) -> Tensor:
    """Read numbers given as a tensor, an array, a list, a range or a set as a tensor.

    Args:
        values: the numbers.
        name: name of the argument, for messages.
        remedy: what to pass instead, for messages.
        device: device of the result; None: that of a tensor, else the CPU.
        error: class of the error.
        is_precise: read a list of floats in float64, whatever the default dtype of torch is.

    Returns:
        The tensor, which may share memory with the values.

    Raises:
        InvalidInputError: anything that is not numbers of a regular shape.

    Example:
        >>> as_tensor({3, 1}, "question", "pass indices").tolist()
        [1, 3]
    """
    given = values
    reason = ""
    try:
        if isinstance(values, Set):
            # A set has no order, and indices need none.
            values = sorted(values)
        elif isinstance(values, range):
            values = list(values)
        elif hasattr(values, "__array__") and not isinstance(values, Tensor):
            values = np.asarray(values)
        if isinstance(values, Tensor):
            return _with_signed_integers(values if device is None else values.to(device))
        if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
            # torch warns of arrays that it must not write, so those are copied.
            array = values if values.flags.writeable else values.copy()
            return _with_signed_integers(torch.as_tensor(array, device=device))
        if isinstance(values, list | tuple):
            tensor = torch.as_tensor(values, device=device)
            if is_precise and tensor.is_floating_point():
                tensor = torch.as_tensor(values, dtype=torch.float64, device=device)
            return tensor
    except (TypeError, ValueError, RuntimeError, OverflowError) as failure:
        reason = f" ({first_line(failure)})"
    shown = " ".join(repr(given).split())
    raise error(f"{name}: must be a tensor or list of numbers, or an array, got {shown:.80}{reason}; {remedy}")


def _with_signed_integers(values: Tensor) -> Tensor:
    """Convert unsigned integers, for which torch lacks most operations."""
    if values.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return values.long()
    return values


def as_mask(region: MaskLike, num_tokens: int, name: str, device: torch.device | str = "cpu") -> Mask:
    """Read a region given as mask, indices or slice as a bool mask over tokens.

    Args:
        region: bool mask ``[T]``, integer indices, or a slice of indices.
        num_tokens: T.
        name: name of the argument, for messages.
        device: device of the result.

    Returns:
        ``[T]`` bool, a copy.

    Raises:
        RegionError: wrong length or dtype, an index outside.

    Example:
        >>> as_mask([0, 2], 4, "question").tolist()
        [True, False, True, False]
    """
    if isinstance(region, slice):
        mask = torch.zeros(num_tokens, dtype=torch.bool, device=device)
        mask[region] = True
        return mask
    values = as_tensor(region, name, "pass a mask over tokens, or indices", device=device, error=RegionError)

    # A mask has one entry per token.
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

    # Indices are integers in range; torch reads an empty list as floats.
    if values.is_floating_point() and values.numel() > 0:
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
    """Read a region as :func:`as_mask` does, on the CPU; an empty tensor of any dtype selects nothing.

    Args:
        region: bool mask ``[T]``, integer indices, or a slice of indices.
        num_tokens: T.
        name: name of the argument, for messages.

    Raises:
        RegionError: wrong length or dtype, an index outside.
    """
    if isinstance(region, slice):
        return as_mask(region, num_tokens, name)
    values = as_tensor(region, name, "pass a mask over tokens, or indices", error=RegionError)
    if values.numel() == 0:
        # An empty mask would have the wrong length.
        values = values.long()
    return as_mask(values, num_tokens, name)


def between(question: Mask, answer: Mask) -> Mask:
    """Select the tokens after the last question token and before the first answer token.

    Args:
        question: ``[T]`` bool.
        answer: ``[T]`` bool, on the same device.

    Returns:
        ``[T]`` bool; all False where one of the regions is empty.
    """
    if not bool(question.any()) or not bool(answer.any()):
        return torch.zeros_like(question)
    position = torch.arange(question.numel(), device=question.device)
    last_question = position[question].max()
    first_answer = position[answer].min()
    return (position > last_question) & (position < first_answer)
