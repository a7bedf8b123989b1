"""The Sweeps protocol: what every backend that solves the two triangular systems offers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

Backend = Literal["auto", "dense", "scatter", "numba", "reference"]
T = TypeVar("T")
IncomingEdges = tuple[int, Any, np.ndarray]
"""The edges into one token: its flat index, the flat indices of their sources (a slice or an array), their weights."""


def in_order(items: Sequence[T], last_first: bool) -> Iterator[T]:
    """Iterate forwards or backwards."""
    return reversed(items) if last_first else iter(items)


@runtime_checkable
class Sweeps(Protocol):
    """Both sweeps of the method with N = C D.

    C holds the weights. It is an argument of every call, because the same structure is solved with several weights.
    D is the diagonal of ``propagation_factor``. Vectors have shape ``[N]`` over the nodes of a batch of graphs, or
    ``[B, T]`` over a batch of sequences.

    Sweeps whose weights are one tensor also have ``outer(at_target, at_source)``. It returns
    ``at_target[t] * D[s] * at_source[s]`` for each weight ``C[t, s]``, which is the form of every gradient of C.

    Attributes:
        propagation_factor: D, what each token propagates of its value: the damping, or 0 where it absorbs.
    """

    propagation_factor: Float64[Tensor, " ..."]

    def potential(self, weight: Any, demand: Tensor) -> Tensor:
        """Solve ``h = b + D C^T h``, last token first."""
        ...

    def influence(self, weight: Any, inflow: Tensor) -> Tensor:
        """Solve ``g = q + C D g``, first token first."""
        ...

    @property
    def can_propagate(self) -> Bool[Tensor, " ..."]:
        """Tokens with D > 0 that may have outgoing edges."""
        ...

    def total(self, x: Tensor) -> Float64[Tensor, " graphs"]:
        """Sum a vector over each graph."""
        ...

    def maximum(self, x: Int64[Tensor, " ..."]) -> Int64[Tensor, " graphs"]:
        """Return the maximum of a vector over each graph."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """Expand one value per graph to all tokens of the graph."""
        ...

    def incoming_edges(self, weight: Any, *, last_first: bool) -> Iterator[IncomingEdges]:
        """Yield the edges into each token, forwards or backwards."""
        ...

    def balanced(self, weight: Any, scale_exponent: Int64[Tensor, " ..."]) -> Any:
        """Return ``C[t, s] * 2**(k[t] - k[s])``, exact within the range of float64.

        The result is 0 where D is 0: such a weight is never propagated, and its scaled value could overflow.
        """
        ...

    def has_edge(
        self,
        weight: Any,
        *,
        source: Bool[Tensor, " ..."],
        target: Bool[Tensor, " ..."],
    ) -> bool:
        """Tell whether any edge with positive weight runs from ``source`` to ``target`` (D is ignored)."""
        ...
