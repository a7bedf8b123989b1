"""The Sweeps protocol that every solver backend implements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

Backend = Literal["auto", "dense", "scatter", "numba", "reference"]


def in_token_order(count: int, last_first: bool, step: int = 1) -> Sequence[int]:
    """Tokens, or the first ones of blocks, forwards or backwards."""
    return range(0, count, step)[:: -1 if last_first else 1]


class Sweeps(Protocol):
    """Both sweeps with N = C D: C the weights, the same shape in every call, and D = diag(``leaves``).

    Sweeps whose weights are one tensor also have ``outer(at_target, at_source)``, ``at_target[t] * (D at_source)[s]``
    for each weight ``C[t, s]``: the shape of every gradient of C. Vectors are ``[N]`` over the nodes of a batch, or
    ``[B, T]`` over sequences.
    """

    propagation_factor: Float64[Tensor, ...]

    def potential(self, weight: Any, demand: Tensor) -> Tensor:
        """``h = b + D C^T h``."""
        ...

    def influence(self, weight: Any, inflow: Tensor) -> Tensor:
        """``g = q + C D g``."""
        ...

    @property
    def can_propagate(self) -> Bool[Tensor, ...]:
        """Tokens that something may leave: D is positive there, and no edges are known to be missing."""
        ...

    def total(self, x: Tensor) -> Float64[Tensor, " graphs"]:
        """Sum over each graph."""
        ...

    def largest(self, x: Int64[Tensor, ...]) -> Int64[Tensor, " graphs"]:
        """Maximum over each graph."""
        ...

    def spread(self, x: Tensor) -> Tensor:
        """One value per graph to all of its tokens."""
        ...

    def weights_into(self, weight: Any, *, last_first: bool) -> Iterator[tuple[int, Any, np.ndarray]]:
        """Token by token: (its flat number, the flat numbers of what it reads, the weights of that)."""
        ...

    def balanced(self, weight: Any, exponent: Int64[Tensor, ...]) -> Any:
        """``C[t, s] * 2**(exponent[t] - exponent[s])``, as exact as the range of float64 allows.

        Zero where D is: what an absorbing token does not hand on may be of any size in other units.
        """
        ...

    def any_weight(self, weight: Any, target: Bool[Tensor, ...], source: Bool[Tensor, ...]) -> bool:
        """Whether any of these sources hands anything to any of these targets (D left aside)."""
        ...
