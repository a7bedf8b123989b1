"""Checks of the numbers that enter a solve: weights, and vectors over tokens, finite and non-negative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from flowgraph.errors import GraphError, InvalidInputError
from flowgraph.masks import as_tensor
from flowgraph.propagation.block_substitution import BLOCK, token_blocks


def is_valid_weight(weight: Tensor) -> Bool[Tensor, "*shape"]:
    """Mark the entries that are finite and non-negative."""
    return torch.isfinite(weight) & (weight >= 0)


def as_batch(vector: Any) -> Any:
    """Return a vector over the tokens of one sequence as a batch of one; anything else unchanged."""
    if isinstance(vector, Tensor | np.ndarray) and vector.ndim == 1:
        return vector[None]
    is_list = isinstance(vector, Sequence) and not isinstance(vector, str)
    if is_list and vector and not isinstance(vector[0], Sequence | Tensor | np.ndarray):
        return [vector]
    return vector


def token_vector(
    vector: Tensor | np.ndarray | Sequence[float],
    shape: torch.Size,
    device: torch.device,
    name: str,
) -> Float64[Tensor, " ..."]:
    """Check a source or demand that the caller passed, and return it in float64.

    Args:
        vector: one non-negative number per token.
        shape: the shape of vectors over the tokens, ``[N]`` or ``[B, T]``.
        device: where the result is needed.
        name: the argument that a message names.

    Raises:
        InvalidInputError: another shape, a negative number, NaN or infinity.
    """
    vector = as_tensor(vector, name, "pass a vector over the tokens", device=device, is_precise=True).double()
    if vector.shape != shape:
        raise InvalidInputError(
            f"{name}: must have one entry per token {tuple(shape)}, got shape {tuple(vector.shape)}; "
            "pass a vector over the tokens"
        )
    if not bool(is_valid_weight(vector).all()):
        raise InvalidInputError(
            f"{name}: must be finite and non-negative, got {vector.min().item():g} as its least; clamp it first"
        )
    return vector


def check_capacity_matrix(matrix: Float[Tensor, "graphs tokens tokens"]) -> None:
    """Check the capacities below the diagonal. Cost: one read of the triangle.

    Entries on and above the diagonal are ignored, here and in every sweep.

    Raises:
        GraphError: a negative capacity or NaN. An infinite capacity makes the potential infinite or NaN, which the
            range check of the solve notices; :func:`check_weights_below_diagonal` then names it.
    """
    # The minimum of a block is NaN if the block holds NaN. Some entries above the diagonal are read as well, so a
    # negative minimum is only a suspicion.
    least = []
    for block in token_blocks(matrix.shape[-1], 4 * BLOCK):
        least.append(matrix.detach()[:, block, : block.stop].amin())
    if not bool(torch.stack(least).amin() >= 0):
        check_weights_below_diagonal(matrix)


def check_weights_below_diagonal(matrix: Float[Tensor, "graphs tokens tokens"]) -> None:
    """Check every weight below the diagonal, and name the first invalid one. Cost: a few copies of the matrix.

    Raises:
        GraphError: NaN, infinite or negative.
    """
    below = matrix.detach().tril(-1)
    invalid = ~is_valid_weight(below)
    if bool(invalid.any()):
        graph, t, s = invalid.nonzero()[0].tolist()
        raise GraphError(
            f"capacity: must be finite and non-negative, got {below[graph, t, s].item()} at [{graph}, {t}, {s}]; "
            "check the attention for NaN or overflow"
        )
